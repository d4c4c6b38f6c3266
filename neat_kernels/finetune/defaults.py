"""The learning rates that `neat-kernels finetune` uses when --lr is not given.

Classification, chosen alike for every method: the best of one grid by accuracy on the 500 validation texts of the
default task, after 200 steps of 32 texts cut to 32 tokens, r=8, scaling 1, seed 0 (the probe: mean of seeds 0 to 2).
The test texts had no say. The head's rate is the probe's best one, whatever the head sits on.

    lr      probe   lora    neat    full
    1e-4    0.253   0.756   0.754   0.814
    3e-4    0.490   0.764   0.762   0.808
    1e-3    0.617   0.770   0.764   0.784
    3e-3    0.680   0.798   0.782   0.126
    1e-2    0.729   0.774   0.748   0.126
    3e-2    0.751   0.126   0.126   0.126
    1e-1    0.737

One such accuracy is uncertain by 0.035: neighbours in a column may change places with the seed. 0.126 is chance.

Language models: the rates of published runs, nothing was measured here. 3e-4 is what Neat's paper (arXiv 2410.01870)
trains LLaMA with (r=32 in q, k, v, up and down, 16 texts in a step); LoRA gets the same, so that the two differ in
nothing else. 1e-5 is full fine-tuning of Llama-3.2-3B in PEFT's own comparison of methods (MetaMathQA), which trains
its adapters, PEANuT included, with 1e-4. They are rates for thousands of steps of a large model; where it matters, give
--lr several.
"""

HEAD_LEARNING_RATE = 3e-2
LEARNING_RATES = {"probe": HEAD_LEARNING_RATE, "lora": 3e-3, "neat": 3e-3, "full": 1e-4}
LM_LEARNING_RATES = {"lora": 3e-4, "neat": 3e-4, "full": 1e-5}
