"""Faults to plant in the library, one at a time, and the tests that must notice. `make mutants` plants them."""

from __future__ import annotations

from mutants.artifact import MUTANTS as ARTIFACT
from mutants.coreset import MUTANTS as CORESET
from mutants.geometry import MUTANTS as GEOMETRY
from mutants.graph import MUTANTS as GRAPH
from mutants.mutant import Mutant
from mutants.pruning import MUTANTS as PRUNING
from mutants.queries import MUTANTS as QUERIES
from mutants.risk import MUTANTS as RISK

MUTANTS: tuple[Mutant, ...] = (*GEOMETRY, *CORESET, *GRAPH, *QUERIES, *PRUNING, *ARTIFACT, *RISK)
