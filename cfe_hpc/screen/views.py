"""What the live screen shows in place of the runs: one run's log, or a question."""

from __future__ import annotations

import threading
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.message import Message
from textual.screen import ModalScreen, Screen
from textual.widgets import Footer, RichLog, Static

from cfe_hpc.reports.rank_logs import Follower
from cfe_hpc.runfolder import RunFolder

__all__ = ["AskScreen", "LogScreen"]

_POLL_S = 0.5
_TAIL_BYTES = 64 * 1024
_MOST_LINES = 5000
_AT_ONCE = 500


class Lines(Message):
    """Lines of a log that are new."""

    def __init__(self, lines: list[Text]) -> None:
        super().__init__()
        self.lines = lines


class LogScreen(Screen[None]):
    """Follows the logs of a run's ranks, merged, from near their end on."""

    CSS = """
    LogScreen #title { height: 1; background: $primary-background; text-style: bold; }
    LogScreen RichLog { height: 1fr; scrollbar-size-vertical: 1; }
    """
    BINDINGS: ClassVar = [
        Binding("escape", "dismiss", "back"),
        Binding("l", "dismiss", "back", show=False),
        Binding("end", "bottom", "newest"),
    ]

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self._folder = folder
        self._leaving = threading.Event()
        self._empty = True

    def compose(self) -> ComposeResult:
        yield Static(f"log of {self._folder.run_id}", id="title", markup=False)
        yield RichLog(max_lines=_MOST_LINES, wrap=True, min_width=20)
        yield Footer(compact=True)

    def on_mount(self) -> None:
        self.query_one(RichLog).write(Text("no rank has written anything yet", style="dim"))
        threading.Thread(target=self._follow, name="cfe-log", daemon=True).start()

    def on_unmount(self) -> None:
        self._leaving.set()

    def action_bottom(self) -> None:
        """Go on with the newest line."""
        self.query_one(RichLog).scroll_end(animate=False)

    def _follow(self) -> None:
        follower = Follower(self._folder, tail_bytes=_TAIL_BYTES)
        while not self._leaving.is_set():
            lines = []
            for log, line in follower.news():
                style = "yellow" if log.stream == "err" else ""
                lines.append(Text.assemble((f"{log.label:>6} ", "dim"), (line, style)))
                if len(lines) == _AT_ONCE:
                    self.post_message(Lines(lines))
                    lines = []
            if lines:
                self.post_message(Lines(lines))
            self._leaving.wait(_POLL_S)

    def on_lines(self, message: Lines) -> None:
        log = self.query_one(RichLog)
        if self._empty:
            log.clear()
            self._empty = False
        at_end = log.scroll_y >= log.max_scroll_y
        for line in message.lines:
            log.write(line, scroll_end=at_end)


class AskScreen(ModalScreen[bool]):
    """A question that is answered with y or n."""

    CSS = """
    AskScreen { align: center middle; }
    AskScreen Vertical { width: 70; max-width: 100%; height: auto; border: thick $error; padding: 1 2; }
    """
    BINDINGS: ClassVar = [
        Binding("y", "answer(True)", "yes"),
        Binding("n", "answer(False)", "no"),
        Binding("escape", "answer(False)", "no", show=False),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Static(self._question, markup=False)
            yield Static("\ny: yes   n: no", markup=False)

    def action_answer(self, yes: bool) -> None:
        """Answer, and go back."""
        self.dismiss(yes)
