"""Scripts of this package as stages of a longer work: each in a process of its own, told once to save and stop."""

import os
import shlex
import signal
import subprocess
import sys

from .loop import stop_signal


def run_script(script: str, options: dict, more: str = "", num_processes: int = 1) -> int:
    """Run `training.<script>`, whose output is this one's; its exit status.

    Ctrl-C and SIGTERM are passed on, once, and raise KeyboardInterrupt here when the script has saved and stopped.

    Args:
        options: by name; those that are "" are left out. more: further ones, as typed.
        num_processes: several are started by torchrun, on CPUs.
    """
    arguments = [str(part) for name, value in options.items() if value != "" for part in (f"--{name}", value)]
    arguments = ["-m", f"training.{script}", *arguments, *shlex.split(more)]
    print(f"python {shlex.join(arguments)}", flush=True)
    several = num_processes > 1  # on CPUs, accelerate must be told
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command = [sys.executable, *(launcher if several else []), *arguments]
    env = os.environ | ({"ACCELERATE_USE_CPU": "true"} if several else {})
    # a session of its own: what a terminal sends to all of its processes would reach the script twice, which kills it
    with subprocess.Popen(command, env=env, start_new_session=True) as process:
        with stop_signal(lambda: process.send_signal(signal.SIGTERM)) as received:
            status = process.wait()
    if received:
        raise KeyboardInterrupt
    return status
