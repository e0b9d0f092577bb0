import threading

from rounds.base import Round


class Hanging(Round):
    name = "hanging"

    def run(self):
        self.wait_for_nobody()

    def wait_for_nobody(self):
        threading.Event().wait()
