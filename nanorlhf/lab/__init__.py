"""Experiments on a finished run: ``nanorlhf lab EXPERIMENT --out RUN``. Each leaves its figures in the run's folder and its section in
the run's report."""

from .overoptimisation import command as _overoptimisation

VERBS = {"overoptimisation": _overoptimisation}
