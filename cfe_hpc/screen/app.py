"""The live screen: a table of runs, the one that is chosen, and how full the partitions are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.message import Message
from textual.widgets import DataTable, Footer, Static

from cfe_hpc.errors import CfeError
from cfe_hpc.launch.ending import cancel
from cfe_hpc.launch.saving import request_save
from cfe_hpc.runfolder import RunFolder
from cfe_hpc.screen import cells
from cfe_hpc.screen.feed import Feed, Line, Picture
from cfe_hpc.screen.views import AskScreen, LogScreen

__all__ = ["WatchApp"]

_EVERY_S = 2.0
_REST = 10
_MOST_S = 15.0
_MOST_PARTITIONS = 6


class PictureTaken(Message):
    """A new picture is there."""

    def __init__(self, picture: Picture) -> None:
        super().__init__()
        self.picture = picture


class Told(Message):
    """Something that was asked for is done, or could not be."""

    def __init__(self, text: str, *, good: bool) -> None:
        super().__init__()
        self.text, self.good = text, good


class WatchApp(App[None]):
    """Shows what a feed's pictures hold, until its reader leaves."""

    CSS = """
    #head { height: 1; background: $primary-background; }
    #runs { height: 1fr; scrollbar-size-vertical: 1; }
    #detail { height: auto; max-height: 4; border-top: solid $primary; }
    #partitions { height: auto; border-top: solid $primary; }
    """
    TITLE = "cfe-hpc watch"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar = [
        Binding("l", "log", "log"),
        Binding("s", "save", "save"),
        Binding("c", "cancel", "cancel"),
        Binding("q", "quit", "quit"),
    ]

    def __init__(self, feed: Feed) -> None:
        super().__init__()
        self._feed = feed
        self._picture: Picture | None = None
        self._columns: list[cells.Column] = []
        self._leaving = threading.Event()

    def compose(self) -> ComposeResult:
        yield Static(id="head", markup=False)
        yield DataTable[Text](id="runs", cursor_type="row", cell_padding=0)
        yield Static(id="detail", markup=False)
        yield Static(id="partitions", markup=False)
        yield Footer(compact=True)

    def on_mount(self) -> None:
        self.query_one("#detail").display = False
        # A thread of its own, that nobody waits for: it may be in the middle of a call that takes a minute.
        threading.Thread(target=self._take_pictures, name="cfe-watch", daemon=True).start()

    def on_unmount(self) -> None:
        self._leaving.set()

    def _take_pictures(self) -> None:
        while not self._leaving.is_set():
            began_s = time.monotonic()
            try:
                self.post_message(PictureTaken(self._feed.picture()))
            except (CfeError, OSError) as error:
                self.post_message(Told(str(error), good=False))
            # A login node has other users: a picture of thousands of runs is taken less often.
            taken_s = time.monotonic() - began_s
            self._leaving.wait(min(max(_EVERY_S, _REST * taken_s), _MOST_S))

    def on_picture_taken(self, message: PictureTaken) -> None:
        self._picture = message.picture
        self._show()

    def on_resize(self, event: events.Resize) -> None:
        self._columns = []
        if self._picture is not None:
            self.call_after_refresh(self._show)

    def on_data_table_row_highlighted(self) -> None:
        self._show_detail()

    def on_told(self, message: Told) -> None:
        self.notify(message.text, severity="information" if message.good else "error", timeout=8)

    # What is shown

    @property
    def _table(self) -> DataTable[Text]:
        return self.screen_stack[0].query_one("#runs", DataTable)

    def _show(self) -> None:
        picture = self._picture
        if picture is None:
            return
        main = self.screen_stack[0]
        with self.batch_update():
            main.query_one("#head", Static).update(self._head(picture))
            self._show_runs(picture)
            self._show_detail()
            shown = [self._partition(each.partition, cells.partition(each, 20)) for each in picture.partitions]
            more = [f"{len(shown) - _MOST_PARTITIONS} more partitions: sinfo"] if len(shown) > _MOST_PARTITIONS else []
            main.query_one("#partitions", Static).update("\n".join([*shown[:_MOST_PARTITIONS], *more]))
            main.query_one("#partitions").display = bool(shown)

    def _head(self, picture: Picture) -> Text:
        text = Text(f"{self.TITLE}  {cells.head(picture)}", style="bold", no_wrap=True, overflow="ellipsis")
        text.highlight_regex(r"\d+ STALLED", cells.STYLES["STALLED"])
        for failure in picture.failures:
            text.append(f"  {failure}", style="bold red")
        return text

    def _partition(self, name: str, bar: str) -> str:
        return cells.cut(f"{cells.cut(name, 14):<14} {bar}", self.size.width)

    def _show_runs(self, picture: Picture) -> None:
        table = self._table
        fresh = not self._columns
        if fresh:
            self._columns = cells.columns(self.size.width)
            table.clear(columns=True)
            for column in self._columns:
                table.add_column(column.title, width=column.width + 1, key=column.title)
        keys = [line.status.run_id for line in picture.lines]
        if fresh or [str(row.value) for row in table.rows] != keys:
            chosen, scroll_y = self._chosen_id(), table.scroll_y
            table.clear()
            for line in picture.lines:
                table.add_row(*self._cells(line), key=line.status.run_id)
            if chosen in keys:
                table.move_cursor(row=keys.index(chosen), scroll=False)
            table.scroll_to(y=scroll_y, animate=False)
            return
        for line in picture.lines:
            shown = table.get_row(line.status.run_id)
            for column, before, cell in zip(self._columns, shown, self._cells(line), strict=True):
                if cell != before or cell.style != before.style:
                    table.update_cell(line.status.run_id, column.title, cell)

    def _cells(self, line: Line) -> list[Text]:
        word = cells.state(line)
        whole = "dim" if word in ("CANCELLED", "COMPLETED") else ""
        styles = {"STATE": cells.STYLES[word], "BEAT": cells.STYLES["STALLED"] if line.stalled else whole}
        return [Text(column.text(line), style=styles.get(column.title, whole)) for column in self._columns]

    def _show_detail(self) -> None:
        line = self._chosen()
        below = self.screen_stack[0].query_one("#detail", Static)
        if below.display != (line is not None):
            below.display = line is not None
            self.refresh_bindings()  # some keys need a run
        if line is not None:
            width = self.size.width
            below.update("\n".join(cells.cut(text, width) for text in cells.detail(line) if text))

    def _chosen_id(self) -> str | None:
        """Id of the run that the cursor is on."""
        table = self._table
        rows = list(table.rows)
        return str(rows[table.cursor_row].value) if 0 <= table.cursor_row < len(rows) else None

    def _chosen(self) -> Line | None:
        chosen = self._chosen_id()
        lines = () if self._picture is None else self._picture.lines
        return next((line for line in lines if line.status.run_id == chosen), None)

    # Keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys that are about a run are for the main screen, while there is one."""
        if action in ("log", "save", "cancel"):
            return len(self.screen_stack) == 1 and self._chosen() is not None
        return True

    def action_log(self) -> None:
        """Follow the log of the run."""
        line = self._chosen()
        if line is not None:
            self.push_screen(LogScreen(_folder(line)))

    def action_save(self) -> None:
        """Have the run save at its next step, and train on."""
        line = self._chosen()
        if line is not None:
            self._do(lambda: request_save(_folder(line)))

    def action_cancel(self) -> None:
        """End the run for good, once that is confirmed."""
        line = self._chosen()
        if line is None:
            return
        folder = _folder(line)

        def answered(yes: bool | None) -> None:
            if yes:
                self._do(lambda: cancel(folder).text)

        self.push_screen(AskScreen(f"Cancel {folder.run_id} for good? Its checkpoints stay."), answered)

    def _do(self, ask: Callable[[], str]) -> None:
        """Ask for something beside the screen, and tell what came of it."""

        def work() -> None:
            try:
                self.post_message(Told(ask(), good=True))
            except (CfeError, OSError) as error:
                self.post_message(Told(str(error), good=False))

        threading.Thread(target=work, name="cfe-ask", daemon=True).start()


def _folder(line: Line) -> RunFolder:
    return RunFolder(Path(line.status.run_dir))
