"""Saving and loading: models in Hugging Face's layout, and the state of an interrupted stage.

A model's folder holds ``config.json`` and ``model.safetensors`` (with the tokenizer's files beside them it is one that
``transformers`` loads). A stage's state is one safetensors file whose header carries the JSON part. Every file is
written to a temporary name, synced and renamed, so a kill leaves the old one or the new one.
"""

import json
import os
import time
from pathlib import Path
from typing import Dict, Tuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from . import parallel
from .config import ModelConfig
from .model import Model, compute_dtype

FORMAT = 1  # raised when a run's folder changes meaning


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a kill at any moment leaves the old content or the new. Of several ranks the first writes,
    and the others wait for it."""
    if parallel.first():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    parallel.wait()


def write_json(path: Path, value) -> None:
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def hf_config(config: ModelConfig, scalar_head: bool) -> dict:
    """``config.json`` as transformers reads it; our own fields ride along under "nanorlhf"."""
    kind = "Qwen3" if config.qk_norm else "Llama"
    head = "ForSequenceClassification" if scalar_head else "ForCausalLM"
    ours = {"format": FORMAT, "scalar_head": scalar_head, **config.__dict__}
    if config.variant == "gpt2":
        return {"model_type": "nanorlhf-gpt2", "nanorlhf": ours}
    return {
        "architectures": [kind + head], "model_type": kind.lower(), "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_size,
        "max_position_embeddings": config.context, "rope_theta": config.rope_base, "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied, **({"num_labels": 1} if scalar_head else {}), "hidden_act": "silu", "attention_bias": False, "torch_dtype": "float32",
        "nanorlhf": ours,
    }


def save_model(folder: Path, model: Model) -> None:
    folder = Path(folder)
    write_atomic(folder / "model.safetensors",
                 save({k: v.detach().contiguous().cpu() for k, v in model.state_dict().items()}, {"format": "pt"}))
    write_json(folder / "config.json", hf_config(model.config, hasattr(model, "score")))


def load_model(folder: Path, dtype: str = "auto", device: str = "cpu", scalar_head: bool = False) -> Model:
    """The model of a folder. With ``scalar_head``, one without gets a new one (a reward model starts from SFT).

    Errors: ValueError, in one sentence, for a missing folder or one of another version.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder} holds no model (config.json and model.safetensors)")
    ours = json.loads((folder / "config.json").read_text()).get("nanorlhf")
    if not ours or ours.get("format") != FORMAT:
        found = ours.get("format") if ours else "none"
        raise ValueError(f"{folder} was written by another version (format {found}; this one reads {FORMAT})")
    fields = {k: v for k, v in ours.items() if k not in ("format", "scalar_head")}
    where = torch.device(device)
    if set(fields) != set(ModelConfig.__dataclass_fields__):
        raise ValueError(f"{folder} was written by another version (its settings differ)")
    model = Model(ModelConfig(**fields), scalar_head or ours["scalar_head"], compute_dtype(dtype, where))
    try:
        missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / 'model.safetensors'} cannot be read as this model ({error})") from error
    if unexpected or [m for m in missing if m != "score.weight"]:
        raise ValueError(f"{folder}: the weights do not fit the configuration ({(missing + unexpected)[0]})")
    return model.to(where)


def save_state(path: Path, tensors: Dict[str, Tensor], meta: dict) -> None:
    """One atomic file: named tensors, and ``meta`` (JSON) in its header."""
    data = {k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()}
    write_atomic(Path(path), save(data, {"meta": json.dumps({"format": FORMAT, **meta})}))


def load_state(path: Path) -> Tuple[Dict[str, Tensor], dict]:
    try:
        with safe_open(path, "pt") as f:
            meta = json.loads(f.metadata()["meta"])
        tensors = load_file(path)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a stage's state ({error})") from error
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path} was written by another version (format {meta.get('format')}; this one reads {FORMAT})")
    return tensors, meta


class StageState:
    """What an interrupted stage needs to go on bit for bit: its models, its optimisers and a few numbers.

    All randomness of a stage is drawn from (seed, step), so there is no generator to save.
    parts: name → Model or Optimizer. every: seconds between saves.
    """

    def __init__(self, path: Path, every: float = 30.0):
        self.path, self.every, self.before = Path(path), every, 0.0
        self.started = self.saved = time.perf_counter()
        self.parts: dict = {}

    @property
    def seconds(self) -> float:
        """Time spent on the stage, over all of its sittings."""
        return self.before + time.perf_counter() - self.started

    def saved_step(self) -> int:
        """Steps that the saved state has behind it; 0 without one."""
        return load_state(self.path)[1]["step"] if self.path.is_file() else 0

    def restore(self, **parts) -> dict:
        """Name the parts, and load them if there is a saved state. Returns its numbers; {"step": 0} at the start."""
        self.parts = parts
        if not self.path.is_file():
            return {"step": 0}
        tensors, meta = load_state(self.path)
        for name, part in parts.items():
            mine = {k[len(name) + 1:]: v for k, v in tensors.items() if k.startswith(name + "/")}
            part.load_state_dict(mine) if isinstance(part, torch.nn.Module) else part.load_state_tensors(mine)
        self.before = meta["seconds"]
        return meta

    def save(self, step: int, **numbers) -> None:
        """Save after ``step`` steps are done."""
        tensors = {}
        for name, part in self.parts.items():
            own = part.state_dict() if isinstance(part, torch.nn.Module) else part.state_tensors()
            tensors.update({f"{name}/{k}": v for k, v in own.items()})
        save_state(self.path, tensors, {"step": step, "seconds": self.seconds, **numbers})
        self.saved = time.perf_counter()

    def tick(self, step: int, **numbers) -> None:
        """Save if the last save is longer ago than ``every``."""
        if parallel.agreed(time.perf_counter() - self.saved >= self.every):
            self.save(step, **numbers)

    def clear(self) -> None:
        """The stage is complete: its state is no longer needed."""
        if parallel.first():
            self.path.unlink(missing_ok=True)
