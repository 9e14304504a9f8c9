"""The volume proofs of the disk path, one line each: python3 .ci/proofs.py [--records N]

Real processes, kills and files, in the system's temporary directory (about 2 kB a record). Ends with status 1 at the
first proof that fails. The test suite has small versions of them. Needs fork, and /proc for the memory.
"""
import argparse
import collections
import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import analysys  # noqa: E402

NOWHERE = "http://127.0.0.1:1"
MEMORY = 50_000  # kB
KILLS = 20
BATCH = 100  # records a request, where nothing else is said


def record(writer, number, size):
    """Return a record of about *size* bytes that says who wrote it and as which one."""
    filler = "易" * ((size - 180) // 3)
    context = {"$lib": "python", "$platform": "python", "$is_login": False, "writer": writer, "number": number}
    return {"appid": "a", "xwho": "u", "xwhat": "proof", "xwhen": 1532514947857, "xcontext": dict(context, f=filler)}


def key(entry):
    return entry["xcontext"]["writer"], entry["xcontext"]["number"]


def check(condition, *message):
    if not condition:
        raise AssertionError(" ".join(map(str, message)))


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        check(time.monotonic() < deadline, "not within", seconds, "s")
        threading.Event().wait(0.01)


class Server(analysys.Receiver):
    """Keeps the keys of each batch that it accepted, and fails at the given rate."""

    def __init__(self, failing=0.0):
        super().__init__()
        self.failing, self.batches = failing, []

    def accept(self, body):
        if random.random() < self.failing:
            return 503, {"code": 500}
        self.batches.append([key(entry) for entry in json.loads(analysys._unpack(body, 1 << 28).decode())])
        return 200, {"code": 200}

    def arrived(self):
        return list(itertools.chain.from_iterable(self.batches))

    def unacknowledged(self):
        """Return how many batches were sent again, as a whole or in part."""
        seen, again = {}, set()
        for number, batch in enumerate(self.batches):
            again.update(seen[entry] for entry in batch if entry in seen)
            seen.update(dict.fromkeys(batch, number))
        return len(again)


class CountingServer(analysys.Receiver):
    """Counts how often each of *size* numbers arrives, in a byte each."""

    def __init__(self, size):
        super().__init__()
        self.counts = bytearray(size)

    def accept(self, body):
        for entry in json.loads(analysys._unpack(body, 1 << 28).decode()):
            self.counts[entry["xcontext"]["number"]] += 1
        return 200, {"code": 200}


# ---------------------------------------------------------------------------
# What the processes of the proofs do: "proofs.py child_NAME ARGUMENT..."
# ---------------------------------------------------------------------------

def child_write(folder, writer, count, is_batch):
    """Write half of the records in this process and half in a fork of it, with one collecter."""
    collecter = analysys.LogCollecter(folder, is_batch == "True")
    half = int(count) // 2
    collecter.uploadData(record(writer, 0, 300))  # the fork finds an open file, and a buffer that is not its own
    pid = os.fork()
    for number in range(1, half) if pid else range(half, int(count)):
        collecter.uploadData(record(writer, number, random.randrange(200, 20000)))
    collecter.close()
    if not pid:
        os._exit(0)
    check(os.waitpid(pid, 0)[1] == 0, "the fork failed")


def child_log(folder, writer):
    collecter = analysys.LogCollecter(folder)
    for number in itertools.count():
        collecter.uploadData(record(writer, number, random.randrange(200, 20000)))
        os.write(1, b".")


def child_spool(folder, writer, url):
    collecter = analysys.BatchCollecter(url, spool_path=folder, queue_cache_max_size=1)
    for number in itertools.count():
        collecter.uploadData(record(writer, number, 400))
        os.write(1, b".")
        time.sleep(0.0005)


def child_fill(folder, writer, url, count):
    """Leave records, print a line, and live on until standard input ends; a fork that never tracks lives on, too."""
    collecter = analysys.BatchCollecter(url, spool_path=folder, queue_cache_max_size=1)
    for number in range(int(count)):
        collecter.uploadData(record(writer, number, 400))
    pid = os.fork()
    if not pid:
        signal.pause()
    print(pid, flush=True)
    sys.stdin.read()
    os.kill(pid, signal.SIGKILL)
    collecter.close()


def child_drain(folder, url):
    """Deliver all that others left, then print the peak of memory."""
    collecter = analysys.BatchCollecter(url, spool_path=folder)
    wait_until(lambda: len(os.listdir(folder)) == 1, 3600)
    collecter.close()
    print_peak()


def child_upload(*arguments):
    status = analysys.main(["upload"] + list(arguments))
    print_peak()
    sys.exit(status)


def print_peak():
    with open("/proc/self/status") as file:
        print([line.split()[1] for line in file if line.startswith("VmHWM")][0])


STARTED = []


def start(work, *arguments):
    command = [sys.executable, os.path.abspath(__file__), work.__name__] + [str(argument) for argument in arguments]
    STARTED.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return STARTED[-1]


def end(process, status=0):
    """Wait for the end of a process and return what it printed."""
    out, err = process.communicate()
    check(process.returncode == status, "status", process.returncode, err.decode()[-2000:])
    return out.decode()


def kill(process):
    """Kill a process that prints a dot for each call, after a random number of them; return how many returned."""
    calls = len(process.stdout.read(random.randrange(1, 400)))
    process.kill()
    return calls + len(process.communicate()[0])


# ---------------------------------------------------------------------------
# The proofs
# ---------------------------------------------------------------------------

def lines_of(folder):
    """Yield the lines of the log files, without their newlines."""
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as file:
            for line in file:
                yield line.rstrip(b"\n")


def eight_processes(folder, options, is_batch=False):
    writers = [start(child_write, folder, writer, 4000, is_batch) for writer in range(4)]  # and a fork of each
    for writer in writers:
        end(writer)
    found = [key(json.loads(line.decode())) for line in lines_of(folder)]
    expected = [(str(writer), number) for writer in range(4) for number in range(4000)]
    check(sorted(found) == expected, len(found), "lines instead of", len(expected))
    return "8 processes x 2,000 records, %s: 16,000 valid lines" % ("batched" if is_batch else "single")


def eight_processes_batched(folder, options):
    return eight_processes(folder, options, True)


def kills_of_a_log(folder, options):
    calls = [kill(start(child_log, folder, life)) for life in range(KILLS)]
    cut, found = 0, collections.Counter()
    for line in lines_of(folder):
        try:
            found[key(json.loads(line.decode()))] += 1
        except ValueError:
            cut += 1
    for life, count in enumerate(calls):
        numbers = sorted(number for writer, number in found if writer == str(life))
        check(numbers in (list(range(count)), list(range(count + 1))), "life", life, "wrote", count, "found", numbers)
    check(cut <= KILLS and max(found.values()) == 1, cut, "cut lines")
    return "kill -9 of a LogCollecter, %d times: %d calls returned, none missing; %d cut lines" % (KILLS, sum(calls), cut)


def kills_of_a_spool(folder, options):
    with Server(failing=0.3) as server:
        calls = [kill(start(child_spool, folder, life, server.url)) for life in range(KILLS)]
        end(start(child_drain, folder, server.url))
        arrived = server.arrived()
    numbers = collections.defaultdict(list)
    for writer, number in dict.fromkeys(arrived):
        numbers[writer].append(number)
    for life, count in enumerate(calls):
        found = numbers[str(life)]
        check(found in (list(range(count)), list(range(count + 1))), "life", life, "wrote", count, "found", len(found))
    again = server.unacknowledged()
    check(again <= KILLS, again, "batches sent again after", KILLS, "kills")
    return "kill -9 of a spool, %d times: %d calls returned, all arrived in order; %d batches twice" % (
        KILLS, sum(calls), again)


def two_of_four(folder, options):
    with Server() as server:
        server.failing = 1.0
        processes = [start(child_fill, folder, writer, server.url, 500) for writer in range(4)]
        forks = [int(process.stdout.readline()) for process in processes]
        for process in processes[:2]:
            process.kill()
        server.failing, began = 0.0, time.monotonic()
        wait_until(lambda: len(server.arrived()) >= 2000 and len(os.listdir(folder)) <= 4)
        took = time.monotonic() - began
        for process in processes[2:]:
            end(process)
        for fork in forks[:2]:
            os.kill(fork, signal.SIGKILL)
        expected = [(str(writer), number) for writer in range(4) for number in range(500)]
        check(sorted(server.arrived()) == expected, len(server.arrived()), "arrived of", len(expected))
    return "four processes, two killed: the others delivered all 2,000 once, in %.1f s" % took


def forks_of_a_reader(folder, options):
    count = 200
    process = start(child_fill, folder, 0, NOWHERE, 40000)
    fork = int(process.stdout.readline())
    process.kill()
    os.kill(fork, signal.SIGKILL)
    with CountingServer(40000) as server:
        end(start(child_fork, folder, server.url, count))
    return "%d children forked while a spool was read: none hung" % count


def child_fork(folder, url, count):
    collecter = analysys.BatchCollecter(url, spool_path=folder, collecter_max_size=20)
    wait_until(lambda: collecter.stats()["delivered"])
    for _ in range(int(count)):
        pid = os.fork()
        if not pid:
            os._exit(0)
        wait_until(lambda child=pid: os.waitpid(child, os.WNOHANG)[0], 10)
    check(collecter.stats()["delivered"] < 40000, "read too soon")
    os._exit(0)


def large_spool(folder, options):
    process = start(child_fill, folder, 0, NOWHERE, options.records)
    fork = int(process.stdout.readline())
    process.kill()
    os.kill(fork, signal.SIGKILL)
    size = sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))
    with CountingServer(options.records) as server:
        began = time.monotonic()
        peak = int(end(start(child_drain, folder, server.url)))
        took = time.monotonic() - began
    check(server.counts == b"\1" * options.records, "missing or doubled")
    check(peak < MEMORY, peak, "kB")
    return "a spool of %d records, %d MB, drained in %d s: peak %.1f MB" % (
        options.records, size / 1e6, took, peak / 1e3)


def large_upload(folder, options):
    parts = [range(start, options.records, 4) for start in range(4)]
    for number, part in enumerate(parts):
        name = os.path.join(folder, "datas_201807251%d.log" % number)
        with gzip.open(name + ".gz", "wb", 1) if number == 3 else open(name, "wb") as file:
            for entry in part:
                file.write(analysys._line(record(0, entry, 400)))
    with CountingServer(options.records) as server:
        began = time.monotonic()
        told = end(start(child_upload, folder, "--server", server.url, "--batch", 5 * BATCH)).splitlines()
        took = time.monotonic() - began
    check(server.counts == b"\1" * options.records, "missing or doubled")
    check(told[0] == "delivered %d, rejected 0, remaining 0" % options.records, told[0])
    check(int(told[-1]) < MEMORY, told[-1], "kB")
    return "upload of %d records in %d s: peak %.1f MB" % (options.records, took, int(told[-1]) / 1e3)


def stopped_uploads(folder, options, number=signal.SIGINT):
    count = 20000
    with open(os.path.join(folder, "datas_2018072510.log"), "wb") as file:
        for entry in range(count):
            file.write(analysys._line(record("0", entry, 400)))
    with Server(failing=0.1) as server:
        for _ in range(KILLS):
            goal = len(server.batches) + random.randrange(1, 9)
            process = start(child_upload, folder, "--server", server.url)
            wait_until(lambda least=goal: len(server.batches) >= least)
            time.sleep(random.uniform(0, 0.01))
            process.send_signal(number)
            end(process, 2 if number == signal.SIGINT else -number)
        server.failing = 0.0
        end(start(child_upload, folder, "--server", server.url))
        arrived, again = server.arrived(), server.unacknowledged()
    check(list(dict.fromkeys(arrived)) == [("0", entry) for entry in range(count)], "missing or out of order")
    check(again <= (0 if number == signal.SIGINT else KILLS), again, "batches sent again")
    return "upload stopped by %s, %d times: all arrived in order, %d batches twice" % (number.name, KILLS, again)


def killed_uploads(folder, options):
    return stopped_uploads(folder, options, signal.SIGKILL)


PROOFS = [eight_processes, eight_processes_batched, kills_of_a_log, kills_of_a_spool, two_of_four, forks_of_a_reader,
          stopped_uploads, killed_uploads, large_spool, large_upload]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1000000, help="of the large spool and the large upload")
    parser.add_argument("proof", nargs="*", help="names of proofs; default: all of " +
                        " ".join(proof.__name__ for proof in PROOFS))
    options = parser.parse_args()
    for proof in [proof for proof in PROOFS if not options.proof or proof.__name__ in options.proof]:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                print("ok      %s (%.0f s)" % (proof(folder, options), time.monotonic() - began), flush=True)
            except Exception as error:
                print("FAILED  %s: %s: %s" % (proof.__name__, type(error).__name__, error), flush=True)
                return 1
            finally:
                for process in STARTED:
                    if process.poll() is None:
                        process.kill()
                        process.wait()
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("child_"):
        globals()[sys.argv[1]](*sys.argv[2:])
    else:
        sys.exit(main())
