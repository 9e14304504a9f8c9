"""The volume proofs of the disk path, one line each: python3 .ci/proofs.py [--records N] [PROOF...]

Real processes, kills and files, in the system's temporary directory (up to 500 bytes a record). Ends with status 1 at
the first proof that fails. The test suite has small versions of them. Needs fork, and /proc for the memory.
"""
import argparse
import functools
import gzip
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import analysys  # noqa: E402

KILLS = 20


def record(writer, number, size=400):
    """Return a record of about *size* bytes that says who wrote it and as which one."""
    context = {"$platform": "python", "writer": str(writer), "number": number, "filler": "易" * ((size - 160) // 3)}
    return {"appid": "a", "xwho": "u", "xwhat": "proof", "xwhen": 1532514947857, "xcontext": context}


def key(entry):
    return entry["xcontext"]["writer"], entry["xcontext"]["number"]


def all_keys(writers, count):
    return [(str(writer), number) for writer in range(writers) for number in range(count)]


def check(condition, *message):
    assert condition, " ".join(map(str, message))


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        check(time.monotonic() < deadline, "not within", seconds, "s")
        threading.Event().wait(0.005)


class Server(analysys.Receiver):
    """Keeps the keys of each batch that it accepted, and fails at the given rate."""

    def __init__(self, failing=0.0):
        super().__init__()
        self.failing, self.batches = failing, []

    def _take(self, body):
        try:
            records = json.loads(analysys._unpack(body, 1 << 28).decode())
        except ValueError:  # the sender was killed inside of it
            return 400, {}
        if random.random() >= self.failing:
            self.batches.append(list(map(key, records)))
            return 200, {"code": 200}
        return 503, {}

    def arrived(self):
        return list(itertools.chain.from_iterable(self.batches))

    def sent_again(self):
        """Return how many of the batches were sent again, as a whole or in part."""
        seen, again = {}, set()
        for number, batch in enumerate(self.batches):
            again.update(seen[entry] for entry in batch if entry in seen)
            seen.update(dict.fromkeys(batch, number))
        return len(again)


# --- What the processes of the proofs do: "proofs.py child_NAME ARGUMENT..."

def child_write(folder, writer, to, count):
    """Write *count* records (none: without end), a dot for each, then end with standard input.

    *to* is "single", "batched" or the URL that a spool is for. A forked child that never tracks outlives it.
    """
    if to in ("single", "batched"):
        collecter, largest = analysys.LogCollecter(folder, to == "batched"), 20000
    else:
        collecter, largest = analysys.BatchCollecter(to, spool_path=folder, queue_cache_max_size=1), 600
    for number in range(int(count or 10**9)):
        collecter.uploadData(record(writer, number, random.randrange(200, largest)))
        os.write(1, b".")
        if number == 0 and not os.fork():
            os.closerange(0, 3)
            signal.alarm(20)
            signal.pause()
    os.write(1, b"\n")
    sys.stdin.read()
    collecter.close()


def child_drain(folder, url, forks):
    """Deliver all that others left, forking children meanwhile."""
    collecter = analysys.BatchCollecter(url, spool_path=folder)
    wait_until(lambda: collecter.stats()["adopted"])
    for _ in range(int(forks)):
        pid = os.fork()
        if not pid:
            os._exit(0)
        timer = threading.Timer(10, os.kill, (pid, signal.SIGKILL))
        timer.start()
        check(os.waitpid(pid, 0)[1] == 0, "a child hangs")
        timer.cancel()
    wait_until(lambda: len(os.listdir(folder)) == 1, 3600)
    collecter.close()


def child_upload(*arguments):
    return analysys.main(["upload"] + list(arguments))


STARTED = []


def start(work, *arguments):
    command = [sys.executable, os.path.abspath(__file__), work.__name__] + list(map(str, arguments))
    STARTED.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return STARTED[-1]


def end(process, status=0):
    """Wait for the end of a process and return the lines that it printed."""
    out, err = process.communicate()
    check(process.returncode == status, "status", process.returncode, err.decode().strip().split("\n")[-1])
    return out.decode().splitlines()


def kill(process):
    """Kill a writer after a random number of its calls; return how many returned."""
    calls = process.stdout.read(random.randrange(1, 400))
    process.kill()
    return len(calls + process.stdout.read())


def check_lives(calls, found):
    """Check that all whose call returned are in *found*, once and in order, and at most one more of each writer."""
    for life, count in enumerate(calls):
        there = [number for writer, number in found if writer == str(life)]
        check(there in (list(range(count)), list(range(count + 1))), "life", life, "wrote", count, "found", len(there))


# --- The proofs: each returns what it has shown

def read(folder):
    """Return the keys of the lines in log files, and the number of lines that are cut."""
    found, cut = [], 0
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as file:
            for line in file:
                try:
                    found.append(key(json.loads(line.decode())))
                except ValueError:
                    cut += 1
    return found, cut


def prove_sharing(folder, options, to):
    for process in [start(child_write, folder, writer, to, 2000) for writer in range(8)]:
        end(process)
    found, cut = read(folder)
    check(sorted(found) == all_keys(8, 2000) and not cut, len(found), "lines,", cut, "of them cut")
    return "8 processes x 2,000 records, %s: 16,000 valid lines" % to


def prove_killed_logs(folder, options):
    calls = [kill(start(child_write, folder, life, "single", "")) for life in range(KILLS)]
    found, cut = read(folder)
    check_lives(calls, found)
    check(cut <= KILLS, cut, "cut lines")
    return "a LogCollecter killed %d times: %d calls returned, none is missing; %d cut lines" % (KILLS, sum(calls), cut)


def prove_killed_spools(folder, options):
    with Server(failing=0.3) as server:
        calls = [kill(start(child_write, folder, life, server.url, "")) for life in range(KILLS)]
        end(start(child_drain, folder, server.url, 0))
    check_lives(calls, dict.fromkeys(server.arrived()))
    check(server.sent_again() <= KILLS, server.sent_again(), "batches sent again")
    return "a spool killed %d times, its server flaky: %d calls returned, all arrived in order; %d batches twice" % (
        KILLS, sum(calls), server.sent_again())


def prove_two_of_four(folder, options):
    with Server(failing=1.0) as server:
        processes = [start(child_write, folder, writer, server.url, 500) for writer in range(4)]
        for process in reversed(processes):
            process.stdout.readline()  # all is written
        for process in processes[:2]:
            process.kill()
        server.failing, began = 0.0, time.monotonic()
        wait_until(lambda: sum(name.endswith(".lock") for name in os.listdir(folder)) == 2)
        took = time.monotonic() - began
        for process in processes[2:]:
            end(process)
    check(sorted(server.arrived()) == all_keys(4, 500), len(server.arrived()), "arrived of 2,000")
    return "four processes, two killed: the others delivered those two's records, once, in %.1f s" % took


def prove_stopped_uploads(folder, options, number):
    with open(os.path.join(folder, "datas_2018072510.log"), "wb") as file:
        file.writelines(analysys._line(record(0, entry)) for entry in range(20000))
    with Server(failing=0.1) as server:
        for _ in range(KILLS):
            goal = len(server.batches) + random.randrange(1, 9)
            process = start(child_upload, folder, "--server", server.url, "--batch", 20)
            wait_until(lambda least=goal: len(server.batches) >= least)
            time.sleep(random.uniform(0, 0.01))
            process.send_signal(number)
            end(process, 2 if number == signal.SIGINT else -number)
        end(start(child_upload, folder, "--server", server.url))
    check(list(dict.fromkeys(server.arrived())) == all_keys(1, 20000), "missing or out of order")
    check(server.sent_again() <= (0 if number == signal.SIGINT else KILLS), server.sent_again(), "batches sent again")
    return "upload stopped %d times by %s: all arrived in order, %d batches twice" % (
        KILLS, signal.Signals(number).name, server.sent_again())


def prove_many_files(folder, options):
    """20,000 files of 20 lines cost 20 times what 1,000 do; followed, hardly anything, and any may grow."""
    took = []
    for name, count in ("few", 1000), ("many", 20000):
        place = os.path.join(folder, name)
        os.mkdir(place)
        for number in range(count):
            with open(os.path.join(place, "datas_%010d.log" % number), "wb") as file:
                file.writelines(analysys._line(record(number, entry, 200)) for entry in range(20))
        with Server() as server:
            began = sum(os.times()[2:4])
            end(start(child_upload, place, "--server", server.url))
            took.append(sum(os.times()[2:4]) - began)
            check(sorted(server.arrived()) == sorted(all_keys(count, 20)), "missing or doubled")
    check(took[1] < 20 * 1.3 * took[0], took, "s of CPU")
    with Server() as server:
        process = start(child_upload, place, "--server", server.url, "--follow")
        spent = [0.0]
        for _ in range(120):  # until it has looked at all
            time.sleep(1)
            spent.append(sum(map(int, open("/proc/%d/stat" % process.pid).read().split()[13:15])) / 100)
            if spent[-1] - spent[-6 if len(spent) > 6 else 0] < 0.2:
                break
        idle, seen = (spent[-1] - spent[-6]) / 5, []
        for number in 0, 12345, 19999:
            began = time.monotonic()
            with open(os.path.join(place, "datas_%010d.log" % number), "ab") as file:
                file.write(analysys._line(record("new", number, 200)))
            wait_until(lambda wanted=("new", number): wanted in server.arrived())
            seen.append(time.monotonic() - began)
        began = time.monotonic()
        process.terminate()
        end(process)
        took.append(time.monotonic() - began)
    told = "upload of 1,000 and 20,000 files: %.1f and %.1f s of CPU; following them takes %.1f %%, a line is there after " \
        "%.1f s, the end after %.1f s" % (took[0], took[1], idle * 100, max(seen), took[2])
    check(idle < 0.02 and max(seen) < 2 and took[2] < 1, told)
    return told


def prove_newlines(folder, options):
    """A small .gz of 10 GB of newlines between two records."""
    member = gzip.compress(b"\n" * (10 << 20))
    with open(os.path.join(folder, "datas_2018072510.log.gz"), "wb") as file:
        file.write(gzip.compress(analysys._line(record(0, 0))))
        file.writelines(itertools.repeat(member, 1024))
        file.write(gzip.compress(analysys._line(record(0, 1))))
    with Server() as server:
        began = time.monotonic()
        peak = int(end(start(child_upload, folder, "--server", server.url))[-1])
        took = time.monotonic() - began
        check(server.arrived() == all_keys(1, 2), server.arrived())
        process = start(child_upload, "--dry-run", folder)
        fds = "/proc/%d/fd" % process.pid
        wait_until(lambda: any(os.path.realpath(os.path.join(fds, fd)).endswith(".gz") for fd in os.listdir(fds)))
        began = time.monotonic()
        process.terminate()
        end(process, 2)
        ended = time.monotonic() - began
    check(peak < 64000 and ended < 0.5, peak, "kB of memory,", ended, "s to the end")
    return "10 GB of newlines in a .gz of %d MB: %.0f s, memory at most %.1f MB; stopped in it: %.2f s to the end" % (
        len(member) * 1024 >> 20, took, peak / 1e3, ended)


def prove_large_spool(folder, options):
    writer = start(child_write, folder, 0, "http://127.0.0.1:1", options.records)
    writer.stdout.readline()
    writer.kill()
    size = sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))
    told = delivered(options, child_drain, folder, "URL", 200)
    return "a spool of %d MB, read while 200 children are forked: %s" % (size / 1e6, told)


def prove_large_upload(folder, options):
    for quarter in range(4):
        name = os.path.join(folder, "datas_201807251%d.log" % quarter)
        with gzip.open(name + ".gz", "wb", 1) if quarter == 3 else open(name, "wb") as file:
            file.writelines(analysys._line(record(0, number)) for number in range(quarter, options.records, 4))
    return "upload of files: " + delivered(options, child_upload, folder, "--server", "URL")


def delivered(options, work, *arguments):
    """Run *work* and check that it delivers all records, once, in little memory."""
    with Server() as server:
        began = time.monotonic()
        peak = int(end(start(work, *[server.url if part == "URL" else part for part in arguments]))[-1])
        took = time.monotonic() - began
    check(sorted(server.arrived()) == all_keys(1, options.records), "missing or doubled")
    check(peak < 64000, peak, "kB of memory")
    return "%d records in %.1f s, memory at most %.1f MB" % (options.records, took, peak / 1e3)


PROOFS = {
    "single": functools.partial(prove_sharing, to="single"),
    "batched": functools.partial(prove_sharing, to="batched"),
    "killed-logs": prove_killed_logs,
    "killed-spools": prove_killed_spools,
    "two-of-four": prove_two_of_four,
    "interrupted-uploads": functools.partial(prove_stopped_uploads, number=signal.SIGINT),
    "killed-uploads": functools.partial(prove_stopped_uploads, number=signal.SIGKILL),
    "many-files": prove_many_files,
    "newlines": prove_newlines,
    "large-spool": prove_large_spool,
    "large-upload": prove_large_upload,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1000000, help="of the large spool and upload; 1000000")
    parser.add_argument("proof", nargs="*", default=list(PROOFS), help="all of " + " ".join(PROOFS))
    options = parser.parse_args()
    for name in options.proof:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                print("ok      %s (%.0f s)" % (PROOFS[name](folder, options), time.monotonic() - began), flush=True)
            except Exception as error:
                print("FAILED  %s: %s: %s" % (name, type(error).__name__, error), flush=True)
                return 1
            finally:
                for process in STARTED:
                    process.kill()
                    process.wait()
                STARTED.clear()
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 1 or not sys.argv[1].startswith("child_"):
        sys.exit(main())
    try:
        sys.exit(globals()[sys.argv[1]](*sys.argv[2:]))
    finally:
        print(re.findall("VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[0])  # kB
