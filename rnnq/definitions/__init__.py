"""Definition files: a study as Python or YAML becomes stages. What a database names is opened only where it may be.

A list of experiments finds here what makes lists of others: `from rnnq.definitions import create_multi_lr_experiments`.
"""

from rnnq.definitions.files import Definition, load, load_source, relative_source, resolve_source
from rnnq.definitions.variations import (
    NARROW_LR_SWEEP,
    STANDARD_LR_SWEEP,
    create_multi_lr_experiments,
    create_multi_seed_experiments,
    fmt,
    generate_lr_sweep_experiment,
    subset_experiments,
)

__all__ = [
    "NARROW_LR_SWEEP",
    "STANDARD_LR_SWEEP",
    "Definition",
    "create_multi_lr_experiments",
    "create_multi_seed_experiments",
    "fmt",
    "generate_lr_sweep_experiment",
    "load",
    "load_source",
    "relative_source",
    "resolve_source",
    "subset_experiments",
]
