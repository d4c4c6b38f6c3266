"""FSDP2: a sharded model is trained and its adapter saved; alone, or by torchrun --nproc-per-node 2 with this file."""

import os
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import neat_kernels as nk


def base_model() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4))


def main() -> None:
    # Started without torchrun it is one process, and shards over one.
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
    rank = mesh.get_rank()

    # Adapters first, then the shards.
    model = nk.apply_neat(base_model(), nk.NeatConfig(r=8, target_modules=["q_proj", "v_proj"])).to(device)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(0, 128, (2 * mesh.size(), 16), device=device)
    mine = tokens.chunk(mesh.size())[rank]
    losses = []
    for _ in range(20):
        loss = model(mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss := loss.detach())
        losses.append(loss.item() / mesh.size())
    assert losses[-1] < losses[0]

    with torch.no_grad():
        trained = model.eval()(tokens).logits.cpu()
    with tempfile.TemporaryDirectory() as folder:
        # Every process takes part; the first one writes.
        saved = nk.save_adapter(model, f"{folder}/adapter")
        if rank == 0:
            whole = nk.load_adapter(base_model(), saved.folder).eval()
            with torch.no_grad():
                torch.testing.assert_close(whole(tokens.cpu()).logits, trained, rtol=1e-3, atol=1e-4)
            print(f"{mesh.size()} process(es), loss {losses[0]:.3f} to {losses[-1]:.3f}; {saved}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
