"""The commands: parse, load, one call, report. ``fastnst VERB`` and ``python scripts/VERB.py`` are the same."""
