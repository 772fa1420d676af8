"""The base of every settings class: frozen, unknown keys refused, field docstrings as docs."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Each room subclasses it for what it owns; cluster/config.py composes the tree."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
