"""The dashboard: a request never waits for the page to be made, nothing is written, loopback only."""

import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from starlette.testclient import TestClient

from dsmoe.sweeps import dashboard
from tests import html_dom
from tests.sweeps import fake_sweep

BASE = "http://127.0.0.1"


def wait_for(condition, secs: float = 60.0):
  end = time.monotonic() + secs
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


def files(folder: pathlib.Path) -> dict[str, tuple[bytes, int]]:
  return {
    str(path): (path.read_bytes(), path.stat().st_mtime_ns)
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def test_requests_are_answered_while_a_page_is_made():
  may_end, made = threading.Event(), []

  def make():
    if made:
      may_end.wait(60)
    made.append(len(made))
    if len(made) == 3:
      raise OSError("the disk is away")
    return f"page {len(made)}"

  pages = dashboard.Pages(make, every_secs=0.01)
  with TestClient(dashboard.application(pages), base_url=BASE) as client:
    wait_for(lambda: pages.latest == "page 1")
    answers = [client.get("/") for _ in range(20)]  # while the second page cannot be made
    assert {answer.text for answer in answers} == {"page 1"} and len(made) == 1
    assert (
      answers[0].headers["refresh"] == "1" and answers[0].headers["cache-control"] == "no-store"
    )
    may_end.set()
    wait_for(lambda: len(made) > 3)  # the third could not be made, and the second stayed
    assert client.get("/").text.startswith("page ")
    assert client.head("/").status_code == 200
  assert not pages._thread.is_alive()  # it ended with the application


def test_before_the_first_page():
  def make():
    raise ValueError("a sweep's workdir must have sweep.json, <this> has none")

  pages = dashboard.Pages(make, every_secs=60.0)
  assert "is being read" in html_dom.check(pages.latest).text()
  with TestClient(dashboard.application(pages), base_url=BASE) as client:
    wait_for(lambda: "cannot be read" in pages.latest)
    answer = client.get("/")
    assert "must have sweep.json, <this> has none" in html_dom.check(answer.text).text()
    assert answer.headers["refresh"] == "1"


def test_only_this_machine_may_read_and_nobody_may_write():
  pages = dashboard.Pages(lambda: "page", every_secs=60.0)
  with TestClient(dashboard.application(pages), base_url=BASE) as client:
    assert client.get("/", headers={"host": "localhost:8000"}).status_code == 200
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.post("/").status_code == 405
    assert client.get("/../etc/passwd").status_code == 404


def test_the_page_of_a_sweep_on_disk_and_nothing_is_written(tmp_path):
  fake_sweep.make(tmp_path)
  before = files(tmp_path)
  make = dashboard.maker(tmp_path, None, 2.0)
  words = " ".join(html_dom.check(make()).text().split())
  assert files(tmp_path) == before
  assert f"{tmp_path}, as of 20" in words and "Sweep fake" in words
  assert "Running trials" in words and "█" in words and "A device hour costs 2." in words
  assert "the loss of step 41 must be finite, got nan" in words


def test_a_port_in_use_is_refused(tmp_path):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(ValueError, match=f"port must be free, {port} is not"):
      dashboard.start(tmp_path, port=port)
  with pytest.raises(ValueError, match="port must be free, 99999 is not"):
    dashboard.start(tmp_path, port=99999)


@pytest.mark.slow
def test_the_process_serves_and_ends_with_its_parent(tmp_path):
  fake_sweep.make(tmp_path)
  code = (
    "import sys, time\nfrom dsmoe.sweeps import dashboard\n"
    "if __name__ == '__main__':\n"
    "  process, address = dashboard.start(sys.argv[1], every_secs=1.0)\n"
    "  print(process.pid, address, flush=True)\n  time.sleep(600)\n"
  )
  script = tmp_path / "parent.py"
  script.write_text(code)
  parent = subprocess.Popen(
    [sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True
  )
  try:
    pid, address = parent.stdout.readline().split()
    assert address.startswith("http://127.0.0.1:")
    pages = []

    def has_page():
      try:
        pages.append(urllib.request.urlopen(address, timeout=60).read().decode())
      except OSError:
        return False
      return "Ranking" in pages[-1]

    wait_for(has_page, 120)
    html_dom.check(pages[-1])
  finally:
    parent.send_signal(signal.SIGKILL)
    parent.wait()

  def is_gone():
    try:
      state = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
      return True
    return state.rpartition(")")[2].split()[0] == "Z"  # nobody has asked for its code yet

  wait_for(is_gone, 60)
