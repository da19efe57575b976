"""The live screen."""

from __future__ import annotations

from typing import ClassVar

from textual.app import App, ComposeResult
from textual.widgets import DataTable, Footer

from cfe_hpc.screen.feed import Feed, Picture

__all__ = ["WatchApp"]


class WatchApp(App[None]):
    """Runs in a table, refreshed every two seconds."""

    BINDINGS: ClassVar = [("q", "quit", "quit")]

    def __init__(self, feed: Feed) -> None:
        super().__init__()
        self._feed = feed

    def compose(self) -> ComposeResult:
        yield DataTable[str](cursor_type="row")
        yield Footer()

    def on_mount(self) -> None:
        self.query_one(DataTable).add_columns("RUN", "STATE", "STEP", "REASON")
        self.set_interval(2.0, self.refresh_picture)
        self.refresh_picture()

    def refresh_picture(self) -> None:
        """Take a new picture beside the screen, and show it."""
        self.run_worker(lambda: self.call_from_thread(self._show, self._feed.picture()), thread=True, exclusive=True)

    def _show(self, picture: Picture) -> None:
        table = self.query_one(DataTable)
        table.clear()
        for line in picture.lines:
            status = line.status
            table.add_row(status.run_id, status.state, str(status.step or "-"), status.reason)
