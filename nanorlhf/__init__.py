"""nanorlhf: tokenizer, pretraining, supervised fine-tuning, reward model and PPO in one small package.

Shapes, everywhere:  B sequences, N tokens of all of them laid end to end, T tokens of one, C model width,
H query heads, Hkv key/value heads, D head width, V vocabulary. A batch is ragged: ``tokens (N,)`` with
``cu_seqlens (B+1,)``; there is no padding.
"""
