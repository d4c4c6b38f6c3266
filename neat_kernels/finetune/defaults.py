"""The learning rates that `neat-kernels finetune` uses when --lr is not given.

Chosen alike for every method: the best of one grid by accuracy on the 500 validation texts of the default task, after
200 steps of 32 texts cut to 32 tokens, r=8, scaling 1, seed 0 (the probe: mean of seeds 0 to 2). The test texts had no
say. The head's rate is the probe's best one, whatever the head sits on.

    lr      probe   lora    neat    full
    1e-4    0.253   0.756   0.754   0.814
    3e-4    0.490   0.764   0.762   0.808
    1e-3    0.617   0.770   0.764   0.784
    3e-3    0.680   0.798   0.782   0.126
    1e-2    0.729   0.774   0.748   0.126
    3e-2    0.751   0.126   0.126   0.126
    1e-1    0.737

One such accuracy is uncertain by 0.035: neighbours in a column may change places with the seed. 0.126 is chance.
"""

HEAD_LEARNING_RATE = 3e-2
LEARNING_RATES = {"probe": HEAD_LEARNING_RATE, "lora": 3e-3, "neat": 3e-3, "full": 1e-4}
