"""Definition files: a study as Python or YAML becomes stages. What a database names is opened only where it may be."""

from rnnq.definitions.files import Definition, load, load_source, relative_source, resolve_source

__all__ = ["Definition", "load", "load_source", "relative_source", "resolve_source"]
