#!/usr/bin/env python3
"""The page of `serve` in Debian's Chromium, headless, by chromedriver's HTTP interface and the standard library alone.

Prints a line a step and exits with 0; where Chromium cannot be had, with 0 and "SKIP: reason". With a directory as its
argument it leaves screenshots there, at 360, 768 and 1440 px in both colour schemes and both languages; they want a font
with Chinese (apt-get install fonts-wqy-microhei).
"""
import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.path.join(os.path.dirname(HERE), "analysys.py")
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
HOSTILE = ['<img src=x onerror="document.title=\'owned\'">', "</script><script>document.title='owned'</script>",
           "\u202egnp.exe", "a\u0000b\u001b[31m", "\"'`${document.title='owned'}", "__proto__", "javascript:alert(1)"]


def fetch(url, data=None, method=None):
    """Return the JSON value of an answer, None where it has none."""
    body = None if data is None else json.dumps(data).encode()
    headers = {"Content-Type": "application/json"}
    with OPENER.open(urllib.request.Request(url, body, headers, method=method), timeout=30) as answer:
        text = answer.read()
    return json.loads(text.decode()) if text else None


def until(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError("not in time: " + what)
        time.sleep(0.05)


class Browser:
    """One session of chromedriver."""

    def __init__(self, driver, profile, language="en", scheme="light"):
        options = {"args": FLAGS + ["--user-data-dir=" + profile, "--lang=" + language, "--accept-lang=" + language],
                   "prefs": {"intl.accept_languages": language, "download.default_directory": profile}}
        capabilities = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        started = fetch(driver + "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self.url = driver + "/session/" + started["value"]["sessionId"]
        self.scheme(scheme)

    def ask(self, path, data=None, method=None):
        try:
            return fetch(self.url + path, data, method)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()[:500]) from None

    def command(self, name, **parameters):
        return self.ask("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def scheme(self, value):
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def open(self, url):
        self.ask("/url", {"url": url})

    def run(self, script):
        return self.ask("/execute/sync", {"script": "return " + script, "args": []})

    def element(self, selector):
        return "/element/" + list(self.ask("/element", {"using": "css selector", "value": selector}).values())[0]

    def click(self, selector):
        self.ask(self.element(selector) + "/click", {})

    def type(self, text):
        """Press the keys of *text*, wherever the focus is."""
        keys = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self.ask("/actions", {"actions": [{"type": "key", "id": "keys", "actions": keys}]})

    def size(self, width, height):
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def picture(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        self.ask("", method="DELETE")


ESCAPE, ENTER, DOWN, UP = "\ue00c", "\ue007", "\ue015", "\ue013"
ROWS = "[...document.querySelectorAll('#rows .row')]"


@contextlib.contextmanager
def serving(port, code=None):
    program = ["-c", code] if code else [SOURCE]
    with subprocess.Popen([sys.executable] + program + ["serve", "--port", str(port)], cwd=os.path.dirname(SOURCE),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True) as started:
        try:
            line = started.stdout.readline()
            assert line.startswith("serving on "), (line, started.stderr.read())
            yield line.split()[-1]
        finally:
            started.send_signal(signal.SIGTERM)
            out, err = started.communicate(timeout=20)
    assert started.returncode == 0 and not err, (started.returncode, out, err)


@contextlib.contextmanager
def driving():
    """Yield the address of a chromedriver, None where there is none."""
    if not shutil.which("chromedriver") or not shutil.which("chromium"):
        yield None
        return
    with tempfile.TemporaryDirectory() as home:
        with open(os.path.join(home, "log"), "w+") as log, \
                subprocess.Popen(["chromedriver", "--port=0"], stdout=log, stderr=log) as started:
            try:
                def port():
                    log.seek(0)
                    found = [line for line in log.read().splitlines() if "successfully on port" in line]
                    return found and found[0].rstrip(".").split()[-1]
                yield "http://127.0.0.1:" + until(port, "chromedriver")
            finally:
                started.terminate()


def record(xwho, xwhat, properties=(), platform="JS", login=False):
    context = {"$lib": "python", "$lib_version": "1", "$platform": platform, "$is_login": login, "$debug": 0}
    return {"appid": "app", "xwho": xwho, "xwhat": xwhat, "xwhen": int(time.time() * 1000),
            "xcontext": dict(properties, **context)}


def post(url, *records):
    return fetch(url + "/up", list(records))["code"]


def fill(url):
    """Post what an application would: a few events, some of them bad."""
    names, who = ["SearchCommodity", "register", "purchase", "payment", "$profile_set"], ["zhangsan", "ABCD123456", "李四"]
    for number in range(40):
        post(url, record(who[number % 3], names[number % 5], {"commodity_name": "跑步机", "commodity_price": 5000 + number,
             "tags": ["run", "记录心率"], "quality": True}, ["JS", "iOS", "Android", "WeChat"][number % 4], number % 2 == 0))
    post(url, record("zhangsan", "purchase", {"commodity_price": "5000", "Quality": False}, "iOS"))
    post(url, record("zhangsan", "purchase", {"commodity_price": None}))
    post(url, record("zhangsan", "purchase"), record("", "purchase"))


def choose(browser, selector, value):
    browser.click("%s option[value=%s]" % (selector, json.dumps(value)))


def rows(browser, part="what"):
    """Return the texts of what is listed, from the top."""
    return browser.run(ROWS + ".map(row => row.querySelector('.%s').textContent)" % part)


def shows(browser, expected, part="what"):
    until(lambda: rows(browser, part) == expected, "the rows %s, not %s" % (expected, rows(browser, part)))


def step_what_comes_is_shown_at_once_newest_on_top(browser, url):
    browser.open(url + "/")
    until(lambda: url in browser.run("document.querySelector('#hint').textContent"), "the hint")
    until(lambda: browser.run("document.querySelector('#state').textContent") == "live", "live")
    post(url, record("u1", "First", {"n": 9007199254740993, "text": 'a \\" b'}), record("u2", "Second", platform="iOS"))
    shows(browser, ["Second", "First"])
    assert post(url, record("u3", "Third", {"bad": None})) == 400
    shows(browser, ["Third", "Second", "First"])
    assert browser.run(ROWS + ".map(row => row.classList.contains('refused'))") == [True, False, False]
    assert "'bad'" in rows(browser, "rest")[0]
    until(lambda: browser.run("[$('accepted').textContent, $('refused').textContent]") == ["2", "1"], "the counts")
    until(lambda: browser.run("document.querySelector('#chart path').getAttribute('d')"), "the chart")


def step_a_click_opens_the_whole_record_with_its_numbers_as_they_came(browser, url):
    browser.click("#rows .row:nth-child(3)")
    text = browser.run("document.querySelector('#json').textContent")
    assert json.loads(text)["xcontext"]["n"] == 9007199254740993 and json.loads(text)["xcontext"]["text"] == 'a \\" b'
    assert browser.run("document.activeElement.id") == "detail"
    browser.click("#copy")
    until(lambda: browser.run("document.querySelector('#copy').textContent") == "Copied", "the copy")
    browser.type(ESCAPE)
    assert browser.run("[document.querySelector('#detail').hidden, document.activeElement.id]") == [True, "rows"]
    browser.click("#rows .row:nth-child(1)")
    assert "'bad'" in browser.run("document.querySelector('#reason').textContent")
    browser.type(ESCAPE)


def step_keys_choose_open_search_and_leave(browser, url):
    browser.click("h1")
    browser.type(UP * 5 + DOWN)
    chosen = "document.querySelector('[aria-selected=true].row .what').textContent"
    assert browser.run(chosen) == "Second"
    assert browser.run("$('rows').getAttribute('aria-activedescendant')") == browser.run(
        "document.querySelector('.row[aria-selected=true]').id")
    browser.type(ENTER)
    assert browser.run("[$('detail').hidden, $('title').textContent]") == [False, "Second"]
    browser.type(DOWN)
    assert browser.run("$('title').textContent") == "First"
    browser.type(ESCAPE + "/iOS")
    shows(browser, ["Second"])
    assert browser.run("$('search').value") == "iOS"
    browser.type("p" + ESCAPE)
    assert browser.run("[document.activeElement.id, $('pause').getAttribute('aria-pressed')]") == ["", "false"]
    browser.run("($('search').value = '', $('search').oninput())")


def step_filters_and_the_search_look_at_everything(browser, url):
    choose(browser, "#what", "First")
    shows(browser, ["First"])
    choose(browser, "#what", "")
    choose(browser, "#platform", "iOS")
    shows(browser, ["Second"])
    choose(browser, "#platform", "")
    choose(browser, "#outcome", "refused")
    shows(browser, ["Third"])
    choose(browser, "#outcome", "accepted")
    shows(browser, ["Second", "First"])
    browser.type("/9007199254740993")
    shows(browser, ["First"])
    for there in 'a \\" b', 'a \\\\\\" b':           # as it reads, and as JSON has it
        choose(browser, "#outcome", "")
        browser.run("($('search').value = %s, $('search').oninput())" % json.dumps(there))
        shows(browser, ["First"])
    browser.run("($('search').value = 'nothing has this', $('search').oninput())")
    shows(browser, [])
    assert browser.run("$('hint').textContent")
    browser.run("($('search').value = '', $('search').oninput())")
    choose(browser, "#outcome", "")
    until(lambda: browser.run("document.querySelectorAll('#counts button').length") == 2, "counts by event")
    browser.click("#counts li:first-child button")
    until(lambda: len(rows(browser)) == 1, "the filter of the counts")
    choose(browser, "#what", "")


def step_what_comes_while_it_is_paused_is_shown_on_going_on(browser, url):
    browser.click("h1")
    browser.type("p")
    post(url, record("u", "Fourth"), record("u", "Fifth"))
    until(lambda: "2 new" in browser.run("$('state').textContent"), "how many are new")
    assert rows(browser) == ["Third", "Second", "First"]
    browser.click("#pause")
    shows(browser, ["Fifth", "Fourth", "Third", "Second", "First"])


def step_the_accepted_ones_of_what_is_shown_are_downloaded_for_upload(browser, url):
    with tempfile.TemporaryDirectory() as folder:
        browser.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=folder)
        browser.type("/u1")
        shows(browser, ["First"])
        browser.click("#download")
        until(lambda: os.listdir(folder) == ["events.jsonl"], "the download")
        with open(os.path.join(folder, "events.jsonl"), encoding="utf-8") as file:
            found = [json.loads(line) for line in file]
        assert [one["xwhat"] for one in found] == ["First"] and found[0]["xcontext"]["n"] == 9007199254740993
        done = subprocess.run([sys.executable, SOURCE, "upload", "--dry-run", os.path.join(folder, "events.jsonl")],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert done.returncode == 0, done
    browser.run("($('search').value = '', $('search').oninput())")


def step_clear_is_for_everybody(browser, url):
    browser.click("#clear")
    shows(browser, [])
    until(lambda: browser.run("$('accepted').textContent") == "0", "no counts")
    with OPENER.open(url + "/api/events") as answer:
        assert answer.read() == b""


def step_hostile_records_are_text(browser, url):
    for hostile in HOSTILE:
        assert post(url, record(hostile, "Event", {"a": hostile}, hostile)) == 200
        post(url, record(hostile, hostile, {hostile: hostile}))
    until(lambda: len(rows(browser)) == 2 * len(HOSTILE), "hostile rows")
    for place in range(1, 2 * len(HOSTILE) + 1):
        browser.run("document.querySelector('#rows .row:nth-child(%d)').click()" % place)
        assert browser.run("document.querySelectorAll('#detail img, #detail script, #rows img, #rows script').length") == 0
    browser.type(ESCAPE)
    browser.click("#tab-inventory")
    until(lambda: browser.run("document.querySelectorAll('details').length") == 1, "the inventory")
    assert browser.run("document.querySelectorAll('img, main script').length") == 0
    browser.click("#tab-events")
    assert browser.run("document.title") == "analysys"
    assert rows(browser, "who")[-1] == HOSTILE[0]
    assert rows(browser, "who")[-5] == "\\u202egnp.exe" and "a\\u0000b\\u001b[31m" in rows(browser, "who")
    browser.run("document.querySelectorAll('#rows .who')[%d].click()" % (2 * len(HOSTILE) - 5))
    shown = browser.run("$('json').textContent")
    assert "\u202e" not in shown and json.loads(shown)["xwho"] == HOSTILE[2]
    browser.type(ESCAPE)


def step_a_record_of_any_size_and_depth_opens_and_hides_no_other(browser, url):
    wide, text = {"k%d" % number: number for number in range(60000)}, json.dumps([record("HERE", "Deep")])
    for depth in 900, 9000:                            # what this Python can decode
        body = text.replace('"HERE"', "[" * depth + "]" * depth).encode()
        with OPENER.open(url + "/up", body) as answer:
            assert json.loads(answer.read().decode())["code"] == 400
    post(url, record("u", "Wide", wide))
    post(url, record("u", "After"))
    until(lambda: rows(browser)[:2] == ["After", "Wide"], "the rows")
    for place in 2, 3, 4:
        browser.run("document.querySelector('#rows .row:nth-child(%d)').click()" % place)
        assert browser.run("[$('detail').hidden, $('json').textContent.length > 9]") == [False, True]
        if place == 2:
            assert json.loads(browser.run("$('json').textContent"))["xcontext"]["k59999"] == 59999
        browser.type(ESCAPE)


def step_the_inventory_shows_conflicts_in_red(browser, url):
    post(url, record("u", "Buy", {"price": 5}), record("u", "Buy", {"Price": "5"}))
    browser.click("#tab-inventory")
    until(lambda: "Price, price" in browser.run("(document.querySelector('.conflicts') || {}).textContent || ''"), "conflict")
    assert browser.run("document.querySelectorAll('tr.bad').length") == 2
    browser.click("#inventory details:first-of-type summary")
    assert browser.run("document.querySelector('details').open") is False
    post(url, record("u", "Buy", {"price": 6}))
    until(lambda: "3 times" in browser.run("$('inventory').textContent"), "three times")
    assert browser.run("document.querySelectorAll('details:not([open])').length") == 1
    browser.click("#tab-events")


def step_a_count_chooses_its_event_however_many_others_there_are(browser, url):
    post(url, *[record("u", "E%03d" % number) for number in range(600)] + [record("u", "Zz")] * 99)
    first = "(document.querySelector('#counts li bdi') || {}).textContent"
    until(lambda: browser.run(first) == "Zz", "the most frequent one on top")
    browser.click("#counts li:first-child button")
    shows(browser, ["Zz"] * 99)
    choose(browser, "#what", "")


STEPS = [value for name, value in list(globals().items()) if name.startswith("step_")]


BEHIND = "import sys, time; now = time.time; time.time = lambda: now() - 86400; import analysys; sys.exit(analysys.main())"


def survives_a_restart(browser, port):
    with serving(port) as url:
        browser.open(url + "/")
        post(url, record("u", "Before"))
        shows(browser, ["Before"])
    until(lambda: browser.run("$('state').className") == "off", "that the server is gone")
    with serving(port) as url:
        until(lambda: browser.run("$('state').className") == "", "that it is back")
        post(url, record("u", "After"))
        shows(browser, ["After", "Before"])
    until(lambda: browser.run("$('state').className") == "off", "that the server is gone again")
    with serving(port, code=BEHIND) as url:
        until(lambda: browser.run("$('state').className") == "", "that it is back, its clock set back")
        post(url, record("u", "Yesterday"))
        shows(browser, ["Yesterday"])


def stays_alive_under_load(browser, url):
    """5,000 events in a few seconds: the last 1,000 are listed, all are counted."""
    browser.open(url + "/")
    before = fetch(url + "/api/inventory")["accepted"]
    for number in range(50):
        post(url, *[record("u", "Load", {"n": number * 100 + place}) for place in range(100)])
    until(lambda: browser.run(ROWS + ".length") == 1000, "a thousand rows")
    until(lambda: browser.run("document.querySelector('.rest').textContent") == "n: 4999", "the last one on top")
    until(lambda: browser.run("$('accepted').textContent.replace(/\\D/g, '')") == str(before + 5000), "the count of all")


def is_chinese_where_the_browser_is(driver, folder):
    with tempfile.TemporaryDirectory() as profile, serving(0) as url:
        browser = Browser(driver, profile, "zh-CN")
        try:
            browser.open(url + "/")
            until(lambda: browser.run("document.querySelector('#state').textContent") == "实时", "实时")
            assert browser.run("document.documentElement.lang") == "zh-CN"
            assert "事件" in browser.run("document.querySelector('nav').textContent")
            if folder:
                look_like_it_should(browser, url, os.path.join(folder, "zh-"))
        finally:
            browser.close()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def look_like_it_should(browser, url, place):
    fill(url)
    for hostile in HOSTILE:
        post(url, record(hostile, "purchase", {"a": hostile, "long": "长" * 255}, hostile))
        post(url, record(hostile, hostile, {hostile: hostile}))
    for width, height in ((360, 740), (768, 1000), (1440, 900)):
        browser.size(width, height)
        for scheme in "light", "dark":
            browser.scheme(scheme)
            browser.open(url + "/")
            until(lambda: browser.run(ROWS + ".length") > 20, "rows")
            until(lambda: browser.run("document.querySelectorAll('#counts li').length") > 3, "counts")
            time.sleep(1.2)
            name = "%s%d-%s-" % (place, width, scheme)
            browser.picture(name + "events.png")
            wide = browser.run("document.documentElement.scrollWidth")
            assert wide <= width, "the page is %d px wide on %d: %s" % (wide, width, browser.run(
                "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth)"
                ".map(e => e.tagName + '#' + e.id + '.' + e.className).slice(0, 20)"))
            browser.run("document.querySelectorAll('#rows .row:not(.refused)')[3].click()")
            browser.picture(name + "record.png")
            browser.type(ESCAPE)
            browser.click("#tab-inventory")
            until(lambda: browser.run("document.querySelectorAll('details').length") > 3, "inventory")
            browser.picture(name + "inventory.png")


def main(folder=None):
    with driving() as driver, tempfile.TemporaryDirectory() as profile:
        if driver is None:
            print("SKIP: no chromium or chromedriver here (apt-get install chromium chromium-driver)")
            return 0
        browser = Browser(driver, profile)
        try:
            browser.size(1440, 900)
            with serving(0) as url:
                for step in STEPS:
                    step(browser, url)
                    print(step.__name__[5:].replace("_", " "), flush=True)
                stays_alive_under_load(browser, url)
                print("5,000 events in a few seconds", flush=True)
            survives_a_restart(browser, free_port())
            print("a page that was open while the server restarted goes on by itself", flush=True)
            if folder:
                with serving(0) as url:
                    look_like_it_should(browser, url, os.path.join(folder, "en-"))
            told = [one["message"] for one in browser.ask("/se/log", {"type": "browser"})]
            told = [one for one in told if "ERR_CONNECTION_REFUSED" not in one and "ERR_INCOMPLETE" not in one
                    and "ERR_CONNECTION_RESET" not in one and "ERR_EMPTY" not in one]
            assert not told, told
        finally:
            browser.close()
        is_chinese_where_the_browser_is(driver, folder)
        print("Chinese where the browser asks for it")
    print("the page: all passed")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
