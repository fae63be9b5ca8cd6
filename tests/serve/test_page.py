"""The page at `/` in a real browser: what it shows is what the server counts, and it moves."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from web_help import Served, ask, served, until

from offramp.runtime.serve.limits import Settings

TABLES = """const tables = {};
for (const section of document.querySelectorAll("section")) {
  const own = tables[section.dataset.model] = {};
  for (const part of section.querySelectorAll("[data-chart]"))
    own[part.dataset.chart] = [...part.querySelectorAll("tr")].map(r => [...r.cells].map(c => c.innerText));
}
return tables;"""
PATHS = """const chart = `section[data-model="${arguments[0]}"] [data-chart="${arguments[1]}"]`;
return [...document.querySelectorAll(chart + " path")].map(p => p.getAttribute("d"));"""
BOXES = """return [...document.querySelectorAll("svg, table, h1, h2, h3, .line, header")].map(e => {
    const r = e.getBoundingClientRect(); return [e.tagName, r.left, r.right, r.height] })"""


def opened(browser: webdriver.Chrome, running: Served, width: int = 1280) -> None:
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(running.url)


def tables(browser: webdriver.Chrome) -> dict[str, dict[str, list[list[str]]]]:
    found: Any = browser.execute_script(TABLES)
    return dict(found)


def work(running: Served, rows: int) -> None:
    """A little of everything happens."""
    metrics = running.observer
    metrics.accepted("tiny", rows)
    for exit, milliseconds in enumerate((1.0, 4.0, 9.0)):
        metrics.answered("tiny", exit, np.full(rows // (exit + 1), milliseconds / 1e3), False)
        metrics.ran("tiny", exit, rows // (exit + 1), 0.001)
    metrics.watched("tiny", "00" + "a" * 62, 0, True, 0.0)
    metrics.watched("tiny", "00" + "a" * 62, 0, False, 1.0)
    metrics.watched("tiny", "00" + "a" * 62, 0, False, None)


def shown(browser: webdriver.Chrome, model: str, chart: str, row: int, column: int) -> str:
    found = tables(browser).get(model, {}).get(chart, [])
    return found[row][column] if len(found) > row else ""


def test_the_numbers_are_the_server_s_and_they_move(browser: webdriver.Chrome) -> None:
    with served() as running:
        work(running, 600)
        opened(browser, running)
        until(lambda: shown(browser, "tiny", "exits", 1, 1) == "600")
        found = tables(browser)
        assert found.keys() == {"tiny", "other"}
        assert [row[:3] for row in found["tiny"]["exits"][1:]] == [
            ["0", "600", "54.5 %"], ["1", "300", "27.3 %"], ["2", "200", "18.2 %"],
        ]  # fmt: skip
        assert found["tiny"]["latency"][1:] == [["0", "1.00", "1.00"], ["1", "4.00", "4.00"], ["2", "9.00", "9.00"]]
        assert [row[:2] for row in found["tiny"]["memory"][1:]] == [["0", "1.0 MiB"], ["1", "2.0 MiB"], ["2", "out"]]
        assert [row[1:] for row in found["tiny"]["queue"][1:]] == [
            ["0", "1", "600.0"], ["0", "1", "300.0"], ["0", "1", "200.0"],
        ]  # fmt: skip
        assert found["tiny"]["risk"][1] == ["3", "2", "50.0 %", "1.00 %", "0.88 %"]
        assert found["other"]["exits"][1][:3] == ["0", "0", "–"]
        work(running, 60)
        running.engine.waiting["tiny", 1] = 17
        running.host.loaded["tiny", 2] = True
        running.host.loaded["tiny", 1] = False
        until(lambda: shown(browser, "tiny", "exits", 1, 1) == "660")
        found = tables(browser)
        assert [row[1] for row in found["tiny"]["memory"][1:]] == ["1.0 MiB", "out", "3.0 MiB"]
        assert found["tiny"]["queue"][2][1] == "17"
        assert found["tiny"]["risk"][1][:2] == ["6", "4"]
        assert "660 rows" in browser.find_element(By.CSS_SELECTOR, "section[data-model=tiny] .line").text


def test_every_line_is_drawn_and_grows(browser: webdriver.Chrome) -> None:
    with served() as running:
        work(running, 600)
        opened(browser, running)
        until(lambda: len(browser.execute_script(PATHS, "tiny", "exits")) == 3)
        for chart, lines in {"latency": 6, "memory": 3, "queue": 3, "risk": 2}.items():
            assert len(browser.execute_script(PATHS, "tiny", chart)) == lines, chart
        before = browser.execute_script(PATHS, "tiny", "exits")
        work(running, 60)
        until(lambda: all(b.count("L") > a.count("L") for a, b in
                          zip(before, browser.execute_script(PATHS, "tiny", "exits"), strict=True)))  # fmt: skip


@pytest.mark.parametrize("width", [1280, 420])
def test_nothing_sticks_out_and_nothing_complains(browser: webdriver.Chrome, width: int) -> None:
    with served() as running:
        work(running, 1_000_000)
        opened(browser, running, width)
        until(lambda: len(browser.execute_script(PATHS, "tiny", "exits")) == 3)
        for tag, left, right, height in browser.execute_script(BOXES):
            assert left >= 0, tag
            assert right <= width, tag
            assert height > 10, tag
        assert browser.get_log("browser") == []
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
        assert {url for url in asked if not url.startswith("data:")} == {f"{running.url}/", f"{running.url}/v1/stats"}


def test_a_server_with_a_token_is_asked_with_it(browser: webdriver.Chrome) -> None:
    with served(Settings(token="correct-horse")) as running:
        opened(browser, running)
        until(lambda: browser.find_element(By.ID, "token").is_displayed())
        assert tables(browser) == {}
        assert browser.get_log("browser") == []
        browser.find_element(By.ID, "token").send_keys("wrong")
        browser.find_element(By.TAG_NAME, "button").click()
        until(lambda: browser.find_element(By.ID, "status").text == "the token is not right")
        browser.find_element(By.ID, "token").send_keys("correct-horse")
        browser.find_element(By.TAG_NAME, "button").click()
        until(lambda: "tiny" in tables(browser))
        assert not browser.find_element(By.ID, "ask").is_displayed()
        browser.refresh()
        until(lambda: "tiny" in tables(browser))
        assert browser.execute_script("return localStorage.length + document.cookie.length") == 0
        browser.execute_script("sessionStorage.clear()")


def test_a_server_that_is_gone_is_said(browser: webdriver.Chrome) -> None:
    with served() as running:
        opened(browser, running)
        until(lambda: "tiny" in tables(browser))
        running.stop()
        until(lambda: "does not answer" in browser.find_element(By.ID, "status").text)


def test_the_page_may_load_nothing_else() -> None:
    with served() as running:
        answer = ask(running, "/")
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert (policy["default-src"], policy["connect-src"]) == ("'none'", "'self'")
        assert b"http://" not in answer.body.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"https://" not in answer.body
