# SPDX-License-Identifier: MIT
"""Measures analysys.py against what the work costs without it: python3 .ci/bench.py [--markdown] [--records N]

Each ratio is that of a measurement to a floor: the same work, or less, written out plainly with the standard library,
without validation, copies, locks or a thread. Both are taken in one process, in turn and several times over; the table
shows the repetition whose ratio is the median. Every row runs in a fresh process, and what it sends goes over loopback
to a receiver in another one, which keeps the bodies and counts the events in them when asked, after the measurement.

The event has a user id of its own, five properties in the call and five super properties; the values differ from event
to event. The floors: *encode*, a kept JSONEncoder on the finished record, to UTF-8; *serial*, build 100 records,
encode, gzip 6, base64, POST on one http.client connection, one thread; *single*, the same with one record a request;
*write*, build, encode, os.write; *stdlib*, importing json, gzip, base64, queue, threading and http.client.
"""

import argparse
import base64
import contextlib
import gc
import gzip
import http.client
import json
import os
import platform
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.abspath(__file__)
MODULE = os.path.join(os.path.dirname(os.path.dirname(HERE)), "analysys.py")
sys.path.insert(0, os.path.dirname(MODULE))
import analysys  # noqa: E402

ROW_TIMEOUT = 120  # seconds: a row that hangs fails
NOISE = 1.15  # by how much a curve may deviate and still be flat
APP, NAME = "fangzhouargo", "SearchCommodity"
SUPERS = {"channel": "官网", "app_version": "4.5.1", "vip_level": 3, "is_member": True, "city": "上海"}
COMMON = dict(SUPERS, **{"$lib": "python", "$lib_version": analysys.__version__, "$platform": "python"})
COMMON.update({"$is_login": False, "$debug": 0})
PRIMES = 2654435761, 2246822519, 3266489917, 668265263, 374761393  # large ones, that scatter the numbers

known = argparse.Namespace()  # what the processes of the bench tell each other
clock = time.perf_counter
thread_time = getattr(time, "thread_time", lambda: time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID))  # 3.6 has none
encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


# The event


def event(number):
    """Return user id and properties; the values have little in common, so that they compress no better than life."""
    a, b, c, d, e = [number * prime % 2**32 for prime in PRIMES]
    return "user-%08x" % a, {
        "commodity_name": "跑步机 %d 型" % b,
        "commodity_brand": "zhonghua-%x" % c,
        "commodity_price": d,
        "commodity_quality": d % 3 > 0,
        "commodity_function": ["run %d" % e, "记录心率 %x" % (a ^ b)],
    }


def events(number):
    return apart([event(one) for one in range(number)])


def apart(made):
    """Keep what the bench made out of the garbage collections that the tracker's records bring about."""
    gc.collect()
    getattr(gc, "freeze", int)()  # since 3.7
    return made


def build(user, properties):
    """Return the record of an event, without a look at it."""
    context = {**COMMON, **properties}
    return {"appid": APP, "xwho": user, "xwhat": NAME, "xwhen": int(time.time() * 1000), "xcontext": context}


def keeper(keep):
    """Return a collecter that gives its records to *keep*."""
    return argparse.Namespace(uploadData=keep, flush=print, close=print)


def make_tracker(collecter):
    tracker = analysys.AnalysysPythonSdk(collecter)
    tracker.setAppId(APP)
    tracker.registerSuperProperties(SUPERS)
    return tracker


def check_records():
    """See to it that the tracker and the floors make the same of an event."""
    kept, (user, properties) = [], event(1)
    make_tracker(keeper(kept.append)).track(user, NAME, properties)
    assert kept == [dict(build(user, properties), xwhen=kept[0]["xwhen"])], "the floors build other records"


# Measuring


class Spent:
    """Measures a `with` block: wall and CPU time, in us an event, and events/s."""

    def __init__(self, number, cpu=thread_time):
        self.number, self.clock = number, cpu

    def __enter__(self):
        self.start, self.cpu = clock(), self.clock()
        return self

    def __exit__(self, *_):
        self.wall = (clock() - self.start) / self.number * 1e6
        self.cpu = (self.clock() - self.cpu) / self.number * 1e6
        self.rate = 1e6 / self.wall


def in_turn(times, floor, row):
    """Return, for each number that *row* and *floor* return, the pair of them whose ratio is the median one.

    Each row stands between two floors and is compared with their mean.
    """
    floors, rows = [floor()], []
    for _ in range(times):
        rows.append(row())
        floors.append(floor())
    chosen = []
    for column in range(min(len(rows[0]), len(floors[0]))):
        means = [(a[column] + b[column]) / 2 for a, b in zip(floors, floors[1:])]
        pairs = sorted(((r[column], mean) for r, mean in zip(rows, means)), key=lambda pair: pair[0] / pair[1])
        chosen.append(pairs[len(pairs) // 2])
    return chosen


def in_rounds(times, function, arguments, choose=min):
    """Return what *choose* makes of the results of *function* for each of *arguments*, called in turn.

    Each round has an order of its own: what comes after something large is slower, 7 % of an import.
    """
    chance, order, rounds = random.Random(1), list(range(len(arguments))), []
    for _ in range(times):
        chance.shuffle(order)
        found = {place: function(arguments[place]) for place in order}
        rounds.append([found[place] for place in range(len(arguments))])
    return [choose(column) for column in zip(*rounds)]


def calls(tracker, given, cpu=thread_time):
    track = tracker.track
    with Spent(len(given), cpu) as spent:
        for user, properties in given:
            track(user, NAME, properties)
    return spent


def single_calls(tracker, given):
    """Return the wall time of each call, in us, the longest last."""
    track, times = tracker.track, []
    for user, properties in given:
        start = clock()
        track(user, NAME, properties)
        times.append((clock() - start) * 1e6)
    return sorted(times)


def encoding(given):
    """Floor: return wall and CPU time, in us a record, and the wall time again for the p99."""
    records = apart([build(user, properties) for user, properties in given])

    def floor():
        with Spent(len(records)) as spent:
            for record in records:
                encode(record).encode("utf-8")
        return spent.wall, spent.cpu, spent.wall

    return floor


def posting(given, size, context=None):
    """Floor: return events/s and CPU time, in us an event, with *size* records a request."""

    def floor():
        connection = http.client.HTTPConnection(known.host)
        if context:
            connection = http.client.HTTPSConnection(known.tls_host, context=context)
        with Spent(len(given), time.process_time) as spent:
            for first in range(0, len(given), size):
                records = [build(user, properties) for user, properties in given[first : first + size]]
                body = base64.b64encode(gzip.compress(encode(records).encode("utf-8"), 6))
                connection.request("POST", "/up", body, {"Content-Type": "application/json"})
                assert json.loads(connection.getresponse().read().decode()) == {"code": 200}
        return spent.rate, spent.cpu

    return floor


def writing(given):
    """Floor: return lines/s, twice."""
    with directory() as path:
        file = os.open(os.path.join(path, "lines"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        with Spent(len(given)) as spent:
            for user, properties in given:
                os.write(file, (encode(build(user, properties)) + "\n").encode("utf-8"))
        os.close(file)
    return spent.rate, spent.rate


@contextlib.contextmanager
def directory():
    path = tempfile.mkdtemp()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # a sender may still be at its spool


@contextlib.contextmanager
def held(**how):
    """Give a tracker whose sender waits for an answer that does not come, with 10 records queued."""
    how = dict({"queue_max_size": 200000, "request_timeout": 600}, **how)
    tracker = make_tracker(analysys.BatchCollecter("http://%s/silent" % known.host, **how))
    fill(tracker, 10)
    time.sleep(0.1)
    yield tracker
    with contextlib.suppress(analysys.AnalysysPythonSdkException):
        tracker.close(0.01)


def arrived():
    """Return how many events the receiver got since it was last asked."""
    connection = http.client.HTTPConnection(known.host)
    connection.request("GET", "/count")
    return json.loads(connection.getresponse().read().decode())["events"]


# Rows. Each function runs in a process of its own and returns the rows that it measured.


def result(what, unit, must, measured, floor=None):
    """Return a row of the table; *must* is a sign and a limit, of the ratio where there is a floor."""
    sign, limit = must.split()[:2]
    compared = measured / floor if floor else measured
    met = compared <= float(limit) if sign == "<=" else compared >= float(limit)
    floors = [shown(floor), "%.3f" % compared] if floor else ["", ""]
    return [what, "%s %s" % (shown(measured), unit)] + floors + [must, "yes" if met else "NO"]


def shown(number):
    return "{:,.0f}".format(number) if number >= 100 else "%.3g" % number


def caller():
    given = events(20000)

    def row():
        with make_tracker(analysys.BatchCollecter("http://" + known.host, queue_max_size=100000)) as tracker:
            tracker.track("first", NAME)  # starts the worker
            spent = calls(tracker, given)
            tracker.flush(60)
            times = single_calls(tracker, given)
            tracker.flush(60)
        return spent.wall, spent.cpu, times[len(times) * 99 // 100]

    wall, cpu, p99 = in_turn(5, encoding(given), row)
    return [
        result("track(), wall / encode", "us", "<= 1.1", *wall),
        result("track(), CPU of the thread / encode", "us", "<= 1.1", *cpu),
        result("track(), p99 / encode", "us", "<= 3", *p99),
    ]


def default_queue():
    given, longest = events(20000), []

    def row():
        with make_tracker(analysys.BatchCollecter("http://" + known.host)) as tracker:
            times = single_calls(tracker, given)
            tracker.flush(60)
        longest.append(times[-1] / 1e3)
        return [sum(times) / len(times)]

    mean = in_turn(5, encoding(given), row)[0]
    return [
        result("track(), default queue / encode", "us", "<= 2.2", *mean),
        result("track(), default queue, longest of 100,000", "ms", "<= 50 ms", max(longest)),
    ]


def end_to_end():
    given = events(20000)

    def row():
        with make_tracker(analysys.BatchCollecter("http://" + known.host, queue_cache_max_size=100)) as tracker:
            arrived()
            with Spent(len(given), time.process_time) as spent:
                calls(tracker, given)
                tracker.flush(60)
        assert arrived() == len(given), "events are lost"
        return spent.rate, spent.cpu

    rate, cpu = in_turn(5, posting(given, 100), row)
    return [
        result("end to end, 20,000 / serial", "events/s", ">= 0.75", *rate),
        result("end to end, CPU of the process / serial", "us", "<= 1.3", *cpu),
    ]


def distance():
    given = events(60000)

    def rate(path):
        how = {"queue_cache_max_size": 1000, "collecter_max_size": 1000, "queue_max_size": 10000}
        with make_tracker(analysys.BatchCollecter("http://%s%s" % (known.host, path), **how)) as tracker:
            arrived()
            with Spent(len(given)) as spent:
                calls(tracker, given)
                tracker.flush(60)
        assert arrived() == len(given), "events are lost"
        return [spent.rate]

    measured, here = in_turn(3, lambda: rate(""), lambda: rate("/after/50"))[0]
    left = 1 / (1 / here + 0.05 / 1000)  # of the rate here, by waiting 50 ms for each 1,000
    return [result("BatchCollecter, 1,000 a request, 50 ms away / here and 50 ms", "events/s", ">= 0.8", measured, left)]


def default_collecter(scheme="http", host=None, number=1000, context=None):
    given = events(number)

    def row():
        collecter = analysys.DefaultCollecter("%s://%s" % (scheme, host or known.host), ssl_context=context)
        with make_tracker(collecter) as tracker:
            return [calls(tracker, given).rate]

    rate = in_turn(7, posting(given, 1, context), row)[0]
    return [result("DefaultCollecter / single, both over " + scheme, "events/s", ">= 0.8", *rate)]


def default_collecter_tls():
    assert known.tls_host, "there is no ssl module, or no openssl command to make a certificate with"
    import ssl

    return default_collecter("https", known.tls_host, 200, ssl.create_default_context(cafile=known.certificate))


def log_collecter():
    given = events(20000)

    def rate(**how):
        with directory() as path:
            with Spent(len(given)) as spent, make_tracker(analysys.LogCollecter(path, **how)) as tracker:
                calls(tracker, given)
            lines = sum(open(os.path.join(path, name), "rb").read().count(b"\n") for name in os.listdir(path))
            assert lines == len(given), "lines are lost"
        return spent.rate

    one, batch = in_turn(5, lambda: writing(given), lambda: (rate(), rate(is_batch=True, batch_num=20)))
    return [
        result("LogCollecter, unbatched / write", "lines/s", ">= 0.55", *one),
        result("LogCollecter, batches of 20 / write", "lines/s", ">= 0.75", *batch),
    ]


def spool():
    given = events(20000)

    def row():
        with directory() as path, held(spool_path=path) as tracker:
            return [calls(tracker, given).wall]

    return [result("track(), spool, sender held / encode", "us", "<= 2", *in_turn(5, encoding(given), row)[0])]


def upload():
    def rate(path):
        with directory() as folder:
            write_logs(folder)
            arrived()
            with Spent(known.records) as spent:
                run = [sys.executable, MODULE, "upload", folder, "--server", "http://%s%s" % (known.host, path)]
                done = subprocess.run(run, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if done.returncode:
            raise RuntimeError((done.stderr.decode().strip() or "no message").splitlines()[-1])
        assert arrived() == known.records, "events are lost"
        return [spent.rate]

    # Few events: the size of this process when it starts a child counts as the child's.
    here = in_turn(1, posting(events(500) * 60, 100), lambda: rate(""))[0]
    far = rate("/after/50")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1e6 if sys.platform == "darwin" else 1024)
    title = "upload of {:,} records".format(known.records)
    return [
        result(title + " / serial", "events/s", ">= 0.95", *here),
        result(title + ", 50 ms away / here", "events/s", ">= 0.4", far[0], here[0]),
        result(title + ", peak memory", "MB", "<= 64 MB", peak),
    ]


def write_logs(path):
    """Write what a LogCollecter would in five hours."""
    for hour in range(5):
        with open(os.path.join(path, "datas_20250101%02d.log" % hour), "wb") as file:
            for number in range(hour, known.records, 5):
                file.write((encode(build(*event(number))) + "\n").encode("utf-8"))


def importing():
    def run_time(code):
        with Spent(1000) as spent:
            subprocess.check_call([sys.executable, "-I", "-S", "-c", code])
        return spent.wall  # ms

    with directory() as path:
        shutil.copy(MODULE, path)
        bare = "import sys; sys.path.insert(0, %r); " % path
        floor = bare + "import json, gzip, base64, queue, threading, http.client"
        ours = bare + "import analysys; analysys.AnalysysPythonSdk(analysys.LogCollecter('.'))"
        run_time(ours)  # compiles it
        nothing, floor, ours = in_rounds(21, run_time, [bare, floor, ours], statistics.median)
    return [result("import, tracker and LogCollecter / stdlib", "ms", "<= 0.5", ours - nothing, floor - nothing)]


def queued_memory():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with held() as tracker:
        before = resident()
        fill(tracker, 50000)
        size = (resident() - before) / 50000
    return [result("memory of a queued event", "bytes", "<= 1300 bytes", size)]


def fill(tracker, number):
    for one in range(number):
        user, properties = event(one)
        tracker.track(user, NAME, properties)


# Curves: the least of several rounds, since what disturbs them only adds


def curve(what, labels, costs, said, met):
    points = ", ".join("%s: %.3g us" % point for point in zip(labels, costs))
    return {"curve": "%s: %s; %s: %s" % (what, points, said, "yes" if met else "NO")}


def properties_curve():
    values = [value for number in range(50) for value in event(number)[1].values()]

    def cost(size):
        given = [("user-%d" % n, {"p%d" % p: values[(n + p) % 250] for p in range(size)}) for n in range(2000)]
        with held() as tracker:
            return calls(tracker, given).cpu

    few, some, many = costs = in_rounds(7, cost, [5, 20, 100])
    said = "linear, the slope from 20 on is %.2f times that up to 20" % ((many - some) / 80 / ((some - few) / 15))
    return [curve("properties, CPU a call", [5, 20, 100], costs, said, many <= 5 * some)]


def threads_curve():
    given = events(16000)

    def bare(share):
        for user, properties in share:
            encode(build(user, properties)).encode("utf-8")

    def cost(number):
        if number < 0:
            return at_once(-number, bare, given)
        with held() as tracker:
            return at_once(number, lambda share: calls(tracker, share), given)

    bare_one, one, _, four, bare_many, many = in_rounds(7, cost, [-1, 1, -4, 4, -16, 16])
    ratio, floor = many / one, bare_many / bare_one
    said = "16 take %.2f times as long as 1 in total (%.2f times with build and encode alone)" % (ratio, floor)
    return [curve("threads, wall a call", [1, 4, 16], [one, four, many], said, ratio <= max(1, floor) * NOISE)]


def at_once(number, function, given):
    """Return the wall time of all threads together, in us an event."""
    gate, size = threading.Barrier(number + 1), len(given) // number
    shares = [given[first : first + size] for first in range(0, len(given), size)]
    threads = [threading.Thread(target=lambda one=one: (gate.wait(), function(one))) for one in shares]
    for thread in threads:
        thread.start()
    with Spent(len(given)) as spent:
        gate.wait()
        for thread in threads:
            thread.join()
    return spent.wall


def queue_curve():
    given = events(2000)

    def cost(tracker):
        if tracker:
            return calls(tracker, given).cpu
        with held() as fresh:
            return calls(fresh, given).cpu

    with held() as long:
        fill(long, 100000)
        few, many = costs = in_rounds(15, cost, [None, long])
    said = "flat, %.2f times as much" % (many / few)
    return [curve("records queued, CPU a call", ["10", "100,000"], costs, said, many <= few * NOISE)]


ROWS = [caller, default_queue, end_to_end, distance, default_collecter, default_collecter_tls, log_collecter, spool, upload]
ROWS += [importing, queued_memory, properties_curve, threads_curve, queue_curve]


# The receiver: a process of its own that does next to nothing


def receive():
    """Say where, and serve until standard input ends."""
    bodies, tls_host = [], None
    if known.certificate:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(known.certificate)
        tls_host = listen(bodies, lambda connection: context.wrap_socket(connection, server_side=True))
    print(json.dumps({"host": listen(bodies, lambda connection: connection), "tls_host": tls_host}), flush=True)
    sys.stdin.read()
    os._exit(0)


def listen(bodies, wrap):
    """Accept connections from now on, a thread each; return where."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)

    def accept():
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0], wrap, bodies), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return "127.0.0.1:%d" % listener.getsockname()[1]


def serve(connection, wrap, bodies):
    """Answer the requests of one connection; those to /silent never, those to /after/50 after 50 ms."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError), wrap(connection) as connection, connection.makefile("rb", 1 << 18) as stream:
        for request in stream:
            headers = dict(field.lower().split(b":", 1) for field in iter(stream.readline, b"\r\n"))
            body = stream.read(int(headers.get(b"content-length", 0)))
            answer = {"code": 200}
            if request.startswith(b"GET /count"):
                answer["events"] = sum(gzip.decompress(base64.b64decode(one)).count(b'"xwhat":') for one in bodies)
                del bodies[:]
            elif b" /silent" in request:
                continue
            else:
                bodies.append(body)
            if b" /after/" in request:
                time.sleep(int(request.split(b"/")[2]) / 1000)
            text = json.dumps(answer).encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))


def make_certificate(path):
    """Return a file with a key and a certificate for 127.0.0.1, or None."""
    file = os.path.join(path, "pem")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout".split() + [file]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "keyUsage=critical,digitalSignature,keyCertSign"]
    try:
        import ssl  # noqa: F401

        certificate = subprocess.check_output(command, stderr=subprocess.DEVNULL)
    except (ImportError, OSError, subprocess.CalledProcessError):
        return None
    with open(file, "ab") as both:
        both.write(certificate)
    return file


# The report


def main():
    """Run all rows and print what they measured; exit with 0 whether the numbers are reached or not."""
    names = [row.__name__ for row in ROWS]
    parser = argparse.ArgumentParser(description="Measures analysys.py; the head of this file says how.")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--records", type=int, default=1000000, help="how many to upload (default: %(default)s)")
    parser.add_argument("--only", metavar="ROW", nargs="+", choices=names, default=names, help=", ".join(names))
    parser.add_argument("--child", help=argparse.SUPPRESS)  # JSON: what a process of the bench is to do
    given = parser.parse_args()
    if given.child:
        vars(known).update(json.loads(given.child))
        receive() if known.row is None else run_row(globals()[known.row])
    else:
        report(given)


def run_row(row):
    """Print what *row* measured, for the process that asked."""
    try:
        check_records()
        found = row()
    except Exception as error:
        found = [[row.__name__, "failed: %s: %.120s" % (type(error).__name__, error)]]
    print(json.dumps(found), flush=True)
    os._exit(0)  # what waits is not to be delivered


def report(given):
    start, load = clock(), os.getloadavg()[0]
    found = [["what", "measured", "floor", "ratio", "must reach", "reached"]]
    with directory() as path:
        what = {"row": None, "certificate": make_certificate(path), "records": given.records}
        receiver = child(what)
        what.update(json.loads(receiver.stdout.readline().decode()))
        for name in given.only:
            if sys.stderr.isatty():
                print(name, "...", file=sys.stderr)
            found += ask(dict(what, row=name))
        receiver.communicate()
    show([row for row in found if isinstance(row, list)], given.markdown)
    print("\n" + "\n".join(("- " if given.markdown else "") + row["curve"] for row in found if "curve" in row))
    print("\n%s; took %.0f s, load at the start %.1f" % (machine(), clock() - start, load))


def child(what):
    command = [sys.executable, HERE, "--child", json.dumps(what)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def ask(what):
    """Run a row in a process of its own."""
    process = child(what)
    try:
        printed = process.communicate(timeout=ROW_TIMEOUT)[0].decode()
    except subprocess.TimeoutExpired:
        process.kill()
        printed = process.communicate()[0].decode()
    return json.loads(printed or '[["%s", "failed: exit status %s"]]' % (what["row"], process.returncode))


def show(rows, markdown):
    if markdown:
        rows.insert(1, ["---"] * 6)
        print("\n".join("| %s |" % " | ".join(row + [""] * (6 - len(row))) for row in rows))
        return
    widths = [max(len(row[column]) for row in rows if len(row) == 6) for column in range(6)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def machine():
    """Say what it was measured on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        model = next((field.split(":")[1].strip() for field in file if field.startswith("model name")), model)
    python = "%s %s" % (platform.python_implementation(), platform.python_version())
    return "%s, %d cores, %s, %s" % (model, os.cpu_count(), python, time.strftime("%Y-%m-%d"))


if __name__ == "__main__":
    main()
