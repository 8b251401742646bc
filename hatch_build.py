"""Puts the data folders inside the package in a wheel; an editable install reads the checkout instead."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class DataFolders(BuildHookInterface[Any]):
    """templates/ -> flashgen/templates and tuning_db/ -> flashgen/tuning_db, in standard wheels only."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatch before a build; `version` is "standard" or "editable"."""
        # force_include in an editable wheel would leave stale copies in site-packages.
        if version == "standard":
            build_data["force_include"] |= {"templates": "flashgen/templates", "tuning_db": "flashgen/tuning_db"}
