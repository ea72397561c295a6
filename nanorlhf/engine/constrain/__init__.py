"""Output that keeps to a form: languages, and their masks over a vocabulary."""

from .constraint import Constraint, State, TokenConstraint, Vocabulary, constrain
from .grammar import grammar
from .guidance import GuidanceConstraint, guidance_json_schema, guidance_lark, guidance_regex
from .json_schema import json_schema
from .language import Language, choice
from .regex import regex
from .template import Template, template

__all__ = [
    "Constraint",
    "GuidanceConstraint",
    "Language",
    "State",
    "Template",
    "TokenConstraint",
    "Vocabulary",
    "choice",
    "constrain",
    "grammar",
    "guidance_json_schema",
    "guidance_lark",
    "guidance_regex",
    "json_schema",
    "regex",
    "template",
]
