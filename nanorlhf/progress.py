"""What a run shows while it works: one bar a stage, with the figures that matter."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

_SHOWN = {"pretrain": ("loss", "tokens_per_s"), "sft": ("loss",), "reward": ("loss", "pair_accuracy"),
          "ppo": ("score", "kl", "length")}


class Progress:
    """Called with each row that a run logs; rows carry "stage", "step" and "steps"."""

    def __init__(self, console: Console):
        self.bars = Bars(TextColumn("{task.description:<11}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                         TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console)
        self.tasks: dict = {}

    def __enter__(self) -> "Progress":
        self.bars.start()
        return self

    def __exit__(self, *_) -> None:
        self.bars.stop()

    def __call__(self, row: dict) -> None:
        if "left_out" in row:
            self.bars.console.print("left out: " + "; ".join(row["left_out"]), markup=False, soft_wrap=True)
            return
        name = {"base": "pretrain"}.get(row["stage"], row["stage"])
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=None, note="")
        if "event" in row or row.get("begin"):
            return
        if row.get("end"):
            task = self.bars.tasks[self.tasks[name]]
            note = f"{row['peak_mib']:.0f} MiB at most" if row.get("peak_mib") else task.fields["note"]
            self.bars.update(self.tasks[name], total=task.completed or 1, completed=task.completed or 1, note=note)
            return
        note = "  ".join(f"{key} {row[key]:.4g}" for key in _SHOWN.get(name, ()) if key in row)
        self.bars.update(self.tasks[name], completed=row["step"], total=row.get("steps"), note=note)
