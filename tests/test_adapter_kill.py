"""A process killed while it saves leaves one whole adapter where one was."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import neat_kernels as nk
from neat_kernels.adapters.folder import _exchange
from tests.adapter_problem import adapted, base, logits

KILLS = 50
# Begun once, since importing torch takes longer than everything else; each fork saves until it is killed.
CHILD = """
import os, sys, torch
from pathlib import Path
import neat_kernels as nk
from tests.adapter_problem import adapted, shake
torch.set_num_threads(1)
torch.manual_seed(0)
models = [adapted("llama")[0], shake(adapted("llama", activation="sin2pi")[0])]
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        while True:
            for model in models:
                nk.save_adapter(model, sys.argv[1], overwrite=True)
    print(child, flush=True)
    os.waitpid(child, 0)
    models.reverse()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_any_moment(tmp_path):
    _skip_where_names_cannot_be_exchanged(tmp_path)
    torch.manual_seed(0)
    model, batch = adapted("llama")
    folder = tmp_path / "adapters" / "adapter"
    nk.save_adapter(model, folder)
    start = time.monotonic()
    nk.save_adapter(model, folder, overwrite=True)
    # Up to four saves: the two models in turn, each at every moment.
    longest = 4 * (time.monotonic() - start)
    good = {"relu": logits(model, batch)}
    moments = random.Random(0)
    command = [sys.executable, "-c", CHILD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        kinds, written = set(), False
        for kill in range(4 * KILLS):
            if kill >= KILLS:
                if kinds == {"relu", "sin2pi"} and written:
                    break
                # A busy machine may have ended no save in time: the moments must reach further.
                longest *= 1.05
            parent.stdin.write("\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            time.sleep(moments.uniform(0.0, longest))
            os.kill(child, signal.SIGKILL)
            loaded = nk.load_adapter(base("llama"), folder)
            kind = next(m for m in loaded.modules() if isinstance(m, nk.FusedNeatLinear)).activation
            # The second kind is known from the first time that it was seen; from then on it must not change.
            assert torch.equal(logits(loaded, batch), good.setdefault(kind, logits(loaded, batch)))
            kinds.add(kind)
            written = written or any(".writing-" in name for name in os.listdir(folder.parent))
        parent.stdin.close()
    assert kinds == {"relu", "sin2pi"}
    assert written, "no kill came while a folder was written"


def _skip_where_names_cannot_be_exchanged(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    if not _exchange(first, second):
        pytest.skip("this file system cannot exchange two names in one step")
