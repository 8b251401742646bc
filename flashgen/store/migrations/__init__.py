"""Alembic's environment for the tuning database: `env.py` and one file per schema revision in `versions/`.

A new revision is a new file `versions/v<NNNN>_<what>.py` that says in plain operations what changes (it never imports
the models, which move on), plus its number at the end of `REVISIONS` in `flashgen.store.schema`. A test compares the
result with the models.
"""
