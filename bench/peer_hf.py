"""Hugging Face's ``generate`` as a contender of bench_engine.py: ``python peer_hf.py FOLDER DTYPE CACHE THREADS``.

CACHE: ``dynamic``; ``static``; ``compiled``, a static one and the forward pass under torch.compile. Attention is torch's SDPA.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, CompileConfig

from child import Watch, reset_peak, resident, serve


def settings(cache):
    if cache == "dynamic":
        return {}
    compiled = CompileConfig(fullgraph=False, mode="default")
    compiled._compile_all_devices = cache == "compiled"
    return {"cache_implementation": "static", "compile_config": compiled, "disable_compile": cache == "static"}


def padded(prompts):
    """Left-padded ids and mask, each (B, T) int64."""
    longest = max(map(len, prompts))
    return (torch.tensor([[0] * (longest - len(p)) + p for p in prompts]),
            torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]))


def contender(folder, dtype, cache, threads):
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    kept = settings(cache)

    @torch.inference_mode()
    def answer(prompts, n=1, new=0, sampled=False, memory=False):
        ids, mask = padded(prompts)
        if not new:
            return {"logits": model(ids, attention_mask=mask).logits[:, -1].float().tolist()}
        drawing = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {"do_sample": False}
        if n > 1 and not sampled:  # greedy samples are all the same, so that generate refuses to draw them
            ids, mask, copies = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0), 1
        else:
            copies = n
        if memory:
            reset_peak()
        before, watch = resident("VmRSS"), Watch()
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new, num_return_sequences=copies, **drawing, **kept)
        return {**watch.read(), "MiB": resident("VmHWM") - before, "ids": out[:, ids.shape[1]:].tolist()}

    return answer


if __name__ == "__main__":
    serve(contender(*sys.argv[1:]))
