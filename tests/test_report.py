import copy
import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest

from nanorlhf.evals import elo, winrate
from nanorlhf.metrics import MetricsLog
from nanorlhf.report import REQUIRED, render, validate, write_report

HOSTILE = (
    '</p><script>alert("x")</script><img src="https://example.com/x.png" onerror=alert(1)> $body {{x}} '
    "\x00\ud800\u202e"
)
MODELS = ["base", "base_prompted", "sft", "best_of_n", "ppo"]


def made_up_report() -> dict:
    """A whole report.json: every key that the page can show, figures from closed forms."""
    scores = {m: [math.sin(7 * i + k) + 0.4 * k for i in range(100)] for k, m in enumerate(MODELS)}
    sources = ["prose", "code", "plays"]
    return {
        "preset": "cpu", "seed": 0,
        "seconds": {"tokenizer": 8.4, "pretrain": 400.0, "sft": 90.0, "reward": 60.0, "ppo": 190.0, "total": 754.2},
        "tokenizer": {"bytes_per_token": {s: 3.5 + k / 10 for k, s in enumerate(sources)}},
        "pretrain": {"bpb": {"prose": 1.9, "code": 1.5, "plays": 2.6}, "tokens_per_s": 12345.6},
        "xz_bpb": {"prose": 2.3, "code": 1.6, "plays": 2.5},
        "sft": {"response_bpb": {"base": 2.4, "sft": 1.7}},
        "reward": {"pair_accuracy": {"film reviews": 0.801, "simulated": 0.74}, "linear_pair_accuracy": 0.79,
                   "quality": {"film reviews": {"calibration": {"error": 0.0431}, "length": {"longer_wins": 0.512, "model_prefers_longer": 0.634,
                                                                                     "accuracy_same_length": None}}}},
        "alignment": {"dpo": {}, "ppo": {"kl": 6.25, "kl_exact": 5.75, "score": 1.75, "length": 21.0, "entropy": 1.5}},
        "ppo": {"kl": 6.25, "entropy": {"base": 3.1, "sft": 2.0, "ppo": 1.5}},
        "gold": {m: winrate.mean_ci95(values) for m, values in scores.items()},
        "win_rate": {
            "sft_vs_base_prompted": winrate.win_rate(scores["sft"], scores["base_prompted"]),
            "ppo_vs_sft": winrate.win_rate(scores["ppo"], scores["sft"]),
        },
        "gold_by_family": {"titles": {m: winrate.mean_ci95(values[:50]) for m, values in scores.items()}},
        "elo": elo.ratings(scores, resamples=50),
        "length": {"sft": 20.0, "ppo": 23.0},
        "diversity": {m: {"distinct_2": 0.4} for m in MODELS},
        "samples": {
            "stages": [
                {
                    "family": family, "prompt": f"Write a line about {what}.", "gold": {"sft": 0.5, "ppo": 1.0},
                    "responses": {m: f"{m}\n{HOSTILE}" if what == "rain" else f"{m} on {what}" for m in MODELS[1:]},
                }
                for family in ("film_reviews", "titles") for what in ("rain", "sun", "snow", "fog")
            ]
        },
        "data": [
            {"source": s, "slot": "books", "version": "1.0", "sha256": "ab" * 32, "bytes": 1_000_000, "documents": 77,
             "epochs": 1.25,
             "licence": "CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/"} for s in sources
        ],
        "left_out": ["plays: no network & no cache"],
        "config": {"model": {"n_layer": 4, "tied": True}, "betas": [0.9, 0.95]},
        "machine": {"cpu": "2 cores", "gpu": None, "versions": {"torch": "2.13.0"}},
    }  # fmt: skip


def write_made_up_run(folder) -> None:
    (folder / "report.json").write_text(json.dumps(made_up_report()))
    log = MetricsLog(folder)
    for step in range(0, 400, 2):
        tokens = step * 4096
        loss = 2.5 + 5.5 * math.exp(-step / 60) + 0.2 * math.sin(step * 1.7)
        if step % 80 == 0:
            for prompt in ("The king", "def add(a, b):"):
                log.append({"stage": "pretrain", "step": step, "event": "sample", "tokens": tokens, "prompt": prompt,
                            "text": HOSTILE if step == 80 else f"{prompt} at step {step}:\nwhat it can"})  # fmt: skip
            bpb = {s: 1.5 + k / 2 + 4 * math.exp(-step / 80) for k, s in enumerate(["code", "prose", "plays"])}
            log.append({"stage": "pretrain", "step": step, "event": "eval", "tokens": tokens, "bpb": bpb})
        log.append({"stage": "pretrain", "step": step, "tokens": tokens, "loss": loss, "lr": 1e-3,
                    "grad_norm": 1 + loss, "tokens_per_s": 12000.0})  # fmt: skip
    for step in range(1, 101):
        log.append({"stage": "sft", "step": step, "loss": 3 - step / 100, "lr": 1e-4})
        log.append({"stage": "reward", "step": step, "loss": 0.7 - step / 400, "pair_accuracy": 0.5 + step / 300})
    for step in (1, 50, 100):
        log.append({"stage": "sft", "step": step, "event": "eval", "response_bpb": 2.4 - step / 150})
        held_out = {"film reviews": 0.5 + step / 350, "simulated": 0.5 + step / 400}
        log.append({"stage": "reward", "step": step, "event": "eval", "pair_accuracy": held_out})
    for step in range(60):
        kl = 6.25 * step / 59
        log.append({"stage": "ppo", "step": step, "score": math.sqrt(kl), "kl": kl - 0.01, "kl_coef": 0.05,
                    "entropy": 2 - step / 120, "length": 20 + step / 20, "policy_loss": -0.01, "value_loss": 0.3,
                    "clip_fraction": 0.05, "ratio_max": 1.4,
                    "explained_variance": None if step == 0 else 0.5, "reward": 0.8 * math.sqrt(kl),
                    **({"gold": math.sqrt(kl) - 0.1 * kl} if step % 10 == 0 else {})})  # fmt: skip


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text outside of style."""

    VOID = {"meta", "br", "img", "link", "input", "hr", "use", "path"}

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.words, self.open, self.unbalanced = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return "".join(self.words)


@pytest.fixture(scope="module", params=["with matplotlib", "without matplotlib"])
def page(request, tmp_path_factory):
    """The whole made-up run, written with and without matplotlib."""
    folder = tmp_path_factory.mktemp("run")
    write_made_up_run(folder)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "without matplotlib":
            patch.setitem(sys.modules, "matplotlib", None)
            patch.setitem(sys.modules, "matplotlib.figure", None)
        else:
            pytest.importorskip("matplotlib")
        path = write_report(folder)
    assert path == folder / "report.html" and sorted(p.name for p in folder.iterdir()) == [
        "metrics.jsonl", "report.html", "report.json",
    ]  # fmt: skip
    return path.read_text(encoding="utf-8")


def test_the_page_refers_to_nothing_outside_itself(page):
    allowed = {"charset", "name", "content", "lang"}
    for tag, attributes in Page(page).tags:
        assert tag not in {"script", "img", "link", "iframe", "object", "embed", "base", "form", "video", "audio"}
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in {"href", "src", "srcset", "action", "data", "poster", "xlink:href"}:
                assert value.startswith("#"), (tag, key, value)
            elif key not in allowed:
                assert "//" not in (value or ""), (tag, key, value)
    style = re.search(r"<style>(.*?)</style>", page, re.S)[1]
    assert "@import" not in style and "url(" not in style
    assert all("url(#" in found for found in re.findall(r"url\(.{2}", page))
    # The licence's address and the hostile text are shown as words, and nothing else speaks of the network.
    words = Page(page).text
    assert page.count("http://") + page.count("https://") == words.count("https://") == 3 + 2 + 2 * len(MODELS[1:])


def test_what_a_model_says_is_shown_and_never_run(page):
    seen = Page(page)
    shown = '<script>alert("x")</script><img src="https://example.com/x.png" onerror=alert(1)> $body {{x}} ␀\ufffd'
    assert seen.text.count(shown) == 2 + 2 * len(MODELS[1:])
    assert "<script" not in page and "<img" not in page


def test_the_page_is_balanced_and_its_ids_are_unique_and_reached(page):
    seen = Page(page)
    assert seen.unbalanced == [] and seen.open == []
    ids = [attributes["id"] for _, attributes in seen.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    links = {a["href"][1:] for tag, a in seen.tags if tag in ("a", "use") and "href" in a}
    assert links <= set(ids)
    assert {i for i in re.findall(r"url\(#([^)]*)\)", page)} <= set(ids)


def test_the_figures_of_the_run_are_on_the_page(page):
    words = Page(page).text
    for figure in [
        "12 min 34 s", "Preset cpu, Seed 0", "12,346 tokens a second", "80.1 %", "2 of 3", "1.25",
        "it fell from 2 to 1.5 nats a token (-25 %)", "from 2.4 to 1.7 bits per byte",
        "PPO answers are 115.0 % as long", "SFT over Prompted base", "PPO over SFT", "Best of n", "logistic regression",
        "Mean gold score by family", "plays: no network & no cache", "CC BY-SA 4.0", "n_layer", "[0.9, 0.95]",
        "What each method cost", "5.75", "Whether its probabilities hold", "4.3 %", "63.4 %",
        "initialisation", "step 80, 327,680 tokens", "film reviews", "2 more",
    ]:  # fmt: skip
        assert figure in words, figure
    assert "Not in this run" not in words and "Not in report.json" not in words


def test_charts_are_drawn_with_matplotlib_and_tables_stand_in_without(page):
    seen = Page(page)
    drawings = [attributes for tag, attributes in seen.tags if tag == "svg"]
    figures = [tag for tag, _ in seen.tags if tag == "figure"]
    assert len(figures) > 20
    if drawings:
        assert len(drawings) == len(figures) and all(a["role"] == "img" and a["aria-label"] for a in drawings)
        assert ".[report]" not in seen.text
        assert not re.search(r"#0[123]0[123]0\d", page), "a colour of the drawing was left"
    else:
        assert 'pip install ".[report]"' in seen.text
    # Every chart's numbers are there as a table either way, and every table says what it shows.
    assert sum(tag == "table" for tag, _ in seen.tags) == sum(tag == "caption" for tag, _ in seen.tags) > len(figures)


def test_an_unfinished_run_is_reported_as_far_as_it_went(tmp_path):
    MetricsLog(tmp_path).append({"stage": "pretrain", "step": 1, "tokens": 10, "loss": 8.0})
    words = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "Not in this run: gold scores" in words and "Not in report.json: seconds.tokenizer" in words
    assert "From 8 to 8 (nats a token" in words


def paths_of(value, name=()):
    """Every path into the nested mappings of a report."""
    for key, item in value.items():
        yield (*name, key)
        if isinstance(item, dict):
            yield from paths_of(item, (*name, key))


@pytest.mark.parametrize("path", list(paths_of(made_up_report())), ids=".".join)
def test_no_missing_or_null_key_stops_the_writer(path):
    for replace in ("drop", "null"):
        partial = copy.deepcopy(made_up_report())
        holder = partial
        for part in path[:-1]:
            holder = holder[part]
        if replace == "drop":
            del holder[path[-1]]
        else:
            holder[path[-1]] = None
        assert Page(render(partial, [], drawn=False)).unbalanced == []


def test_a_whole_report_has_no_gaps_and_each_missing_key_is_named():
    assert validate(made_up_report()) == []
    assert validate({}) == list(REQUIRED)
    partial = made_up_report()
    del partial["win_rate"]["ppo_vs_sft"]["n"], partial["data"][1]["sha256"]
    del partial["elo"]["sft"]["ci95"], partial["ppo"]["kl"]
    partial["reward"]["pair_accuracy"] = {}
    assert validate(partial) == [
        "reward.pair_accuracy.*", "ppo.kl", "win_rate.ppo_vs_sft.n", "elo.sft.ci95", "data.1.sha256",
    ]  # fmt: skip


def test_an_entropy_that_rises_is_not_called_a_fall():
    partial = made_up_report()
    partial["ppo"]["entropy"]["ppo"] = 2.5
    assert "did not fall: it rose from 2 to 2.5 nats a token (+25 %)" in Page(render(partial, [], False)).text


def test_a_folder_without_a_run_and_a_broken_report_get_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="expected report.json or metrics.jsonl"):
        write_report(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON in"):
        write_report(tmp_path)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object in .*, got list"):
        write_report(tmp_path)
