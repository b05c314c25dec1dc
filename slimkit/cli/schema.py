"""`slimkit schema`: the recipe's JSON Schema, for editors and other checkers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from slimkit.cli import options
from slimkit.cli.session import session


def schema(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A file; standard output by default.", show_default=False)
    ] = None,
    force: options.Force = False,
) -> None:
    """Print the JSON Schema of recipes.

    Editors complete and check a recipe that begins with: # yaml-language-server: $schema=recipe.schema.json

    Example: slimkit schema --out recipe.schema.json
    """
    with session("schema", options.Output()) as talk:
        from slimkit.core import files
        from slimkit.core.jobs import claim
        from slimkit.core.run.recipe import Recipe

        made = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
        if out is None:
            talk.line(json.dumps(made, indent=1))
            return
        with claim.claimed(out, file=True, force=force):
            files.write_json(out, made)
        talk.line(f"Written: {out}")
