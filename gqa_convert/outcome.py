"""What every result can do: turn into plain values, and into a table. Imports neither torch nor pandas."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas


class Outcome(ABC):
    """A result with `to_json`, as a dictionary and as a pandas table."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values: what `--json` prints, without its schema version."""
        return self.to_json()

    def table_rows(self) -> list[dict[str, Any]]:
        """The rows of `to_pandas`: one for the whole result, unless there is more to tell apart."""
        return [self.to_json()]

    def to_pandas(self) -> pandas.DataFrame:
        """The result as a table; nested values have columns with dots in their names.

        pandas comes with datasets, on which this package depends.
        """
        import pandas

        return pandas.json_normalize(self.table_rows())
