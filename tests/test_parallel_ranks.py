"""nanorlhf/parallel.py: two processes, each with its share of the episodes, train the weights that one would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanorlhf import metrics
from nanorlhf.parallel import gather, share, size, sum_gradients, weighted_means

HERE = Path(__file__).resolve().parent
PROGRAM = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
import test_update as u
from nanorlhf import parallel
torch.set_num_threads(1)
parallel.start(torch.device("cpu"))
folder, rows = Path(sys.argv[1]), {}
for name in sys.argv[2:]:
    config, rows[name] = u.CONFIGS[name], []
    own = folder / f"{name}-{parallel.rank()}"
    own.mkdir()
    policy = u.train(config, own, rows[name].append)
    save_file({"kl": torch.tensor([r["kl"] for r in rows[name]]), "score": torch.tensor([r["score"] for r in rows[name]]),
               "ratio_max": torch.tensor([r["ratio_max"] for r in rows[name]]),
               "loss": torch.tensor([r["policy_loss"] for r in rows[name]]), **policy.state_dict()}, own / "end.safetensors")

import test_dpo, test_reward
from nanorlhf.config import OptimConfig, PretrainConfig, RewardConfig
from nanorlhf.optim import Optimizer
from nanorlhf.train import dpo, pretrain, reward, sft
from tiny import model, random_sequences

def gradients(name, net, run):
    optimizer = Optimizer(net, OptimConfig(), 1)
    measured = run(net, optimizer)
    if name != "pretrain":  # whose step sums them, and whose weights are kept instead
        parallel.sum_gradients(optimizer.params)
    kept = {k: p.grad if name != "pretrain" else p for k, p in net.named_parameters() if name == "pretrain" or p.grad is not None}
    numbers = {k: torch.tensor(v) for k, v in measured.items() if k not in ("lr", "grad_norm")}
    own = folder / f"{name}-{parallel.rank()}"
    own.mkdir()
    save_file({**kept, **numbers}, own / "end.safetensors")

examples = [(ids, [0] * (1 + i % 2) + [1] * (len(ids) - 1 - i % 2)) for i, ids in enumerate(random_sequences(5, 9, shortest=4))]
groups = [reward.Ranking("x", random_sequences(3, 7, seed=i), ranks) for i, ranks in enumerate(([0, 1, 2], [1, 0, 0], [0, 0, 0], [2, 1, 0], [0, 1, 1]))]
rows_of, each = PretrainConfig(rows=3, row_tokens=8, micro_rows=1), torch.arange(24) % 23
gradients("sft", model(), lambda net, _: {"loss": sft.backward(net, examples)})
gradients("dpo", model(1), lambda net, _: dpo.backward(net, model(0), test_dpo.PAIRS[:5], test_dpo.CONFIG))
gradients("kwise", model(0, True), lambda net, _: reward.backward(net, groups, RewardConfig(loss="kwise")))
gradients("pairwise", model(0, True), lambda net, _: reward.backward(net, groups, RewardConfig(loss="pairwise")))
gradients("alone", model(0, True), lambda net, _: reward.backward(net, groups[:1], RewardConfig()))
gradients("pretrain", model(), lambda net, o: pretrain.train_step(net, o, each, torch.tensor([0, 5, 8, 16, 20, 24], dtype=torch.int32), rows_of, 0))
"""
SUPERVISED = ("sft", "dpo", "kwise", "pairwise", "alone", "pretrain")
NAMES = ("ppo", "rloo", "rloo, one prompt", "grpo")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ended(folder, ranks):
    """{(name, rank): tensors} of trainings in so many processes."""
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    port = str(free_port())
    running = []
    for rank in range(ranks):  # what torchrun does
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1",
                       "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        running.append(subprocess.Popen([sys.executable, str(folder / "program.py"), str(folder), *NAMES], env=environment,
                                        stderr=subprocess.PIPE, text=True))
    try:
        for process in running:
            _, err = process.communicate(timeout=240)
            assert process.returncode == 0, err
    finally:
        for process in running:
            process.kill()
    return {(name, rank): load_file(folder / f"{name}-{rank}" / "end.safetensors") for name in NAMES + SUPERVISED for rank in range(ranks)}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_ranks_end_where_one_does(tmp_path):
    """The same prompts, draws, minibatches and sums, added up in another order; and both ranks hold the same bits."""
    one, two = ended(tmp_path / "one", 1), ended(tmp_path / "two", 2)
    for name in NAMES + SUPERVISED:
        for key, value in one[name, 0].items():
            assert torch.equal(two[name, 0][key], two[name, 1][key]), (name, key)
            torch.testing.assert_close(two[name, 0][key], value, atol=2e-4, rtol=1e-3, msg=lambda m: f"{name} {key}: {m}")


def test_shares_are_everything_once():
    for count in (0, 1, 5, 6, 17):
        for ranks in (1, 2, 3, 7):
            parts = [list(range(count))[share(count, rank, ranks)] for rank in range(ranks)]
            assert [i for part in parts for i in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_rank_of_its_own_changes_nothing():
    p = torch.nn.Parameter(torch.zeros(2))
    sum_gradients([p])
    assert size() == 1 and p.grad is None and gather("x") == ["x"]
    assert weighted_means([(1.0, {"a": 2.0, "b_max": 1.0}), (3.0, {"a": 6.0, "b_max": 0.5})]) == {"a": 5.0, "b_max": 1.0}


@pytest.mark.slow
def test_a_whole_run_on_two_ranks_writes_what_one_writes(tmp_path):
    """torchrun as a user calls it. bf16 sums in another order part ways in time; the first step of each supervised stage does not."""
    rows = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port()), "-m", "nanorlhf",
                        "run", "--preset", "tiny", "--device", "cpu", "--out", str(out)], check=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert (out / "report.html").is_file()
        rows.append([r for r in metrics.read(out) if "event" not in r])
    assert [(r["stage"], r["step"]) for r in rows[0]] == [(r["stage"], r["step"]) for r in rows[1]]
    for one, two in zip(*rows):
        if one["stage"] == "pretrain":
            assert two["loss"] == pytest.approx(one["loss"], abs=2e-3)
