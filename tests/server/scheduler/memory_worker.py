"""A worker whose model has as many GiB of weights as its path says ("gib-5") and that obeys memory commands.

The path "gib-5-stubborn" refuses to squeeze and to sleep; "gib-5-breaks" ends while it wakes; "gib-5-slow" takes half a
second to fall asleep, and gives a squeeze up when it is told another lease. A prompt "hold" runs until it is cancelled
and holds 1,000 tokens; any other is answered at once.
"""

from __future__ import annotations

import argparse
import socket
import time

from server.worker import messages as m
from server.worker.channel import SocketChannel

GIB = 2**30
KL = {"4x": 0.001, "8x": 0.004, "16x": 0.012}
EXACT = 131_072


def ready(gib: float, setting: str, load: m.Load) -> m.Ready:
    """The figures of a model."""
    ladder = [m.LadderFigure(name, 16 / float(name[:-1]), kl, float(name[:-1])) for name, kl in KL.items()]
    name = "4x" if setting == "auto" else setting
    token = EXACT / float(name[:-1])
    return m.Ready(
        context_length=32_768,
        setting=name,
        kl_mean=KL[name],
        bytes_per_token=token,
        bytes_per_token_exact=EXACT,
        weights_bytes=int(gib * GIB),
        device=load.device,
        shares={name: size / sum(load.max_memory.values()) for name, size in load.max_memory.items()},
        ladder=ladder,
    )


def main() -> None:
    """Serve until the gateway closes the socket."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    channel = SocketChannel(socket.socket(fileno=parser.parse_args().fd))
    load = channel.receive()
    assert isinstance(load, m.Load)
    parts = load.path.split("-")
    gib, kind = float(parts[1]), parts[-1]
    asleep, held, squeezing = False, [], ""
    channel.send(ready(gib, load.setting, load))
    while (message := channel.receive()) is not None and not isinstance(message, m.Shutdown):
        if isinstance(message, m.Ping):
            channel.send(m.Pong(message.seq))
        elif isinstance(message, m.Submit):
            assert not asleep, "a request came to a worker that sleeps"
            channel.send(m.Accepted(message.request_id, 5))
            if message.prompt == "hold":
                held.append(message.request_id)
            else:
                channel.send(m.Finished(message.request_id, 0, "stop", m.Usage(5, 1, 64)))
        elif isinstance(message, m.Cancel):
            held = [name for name in held if name != message.request_id]
        elif kind == "stubborn" and isinstance(message, (m.SetSetting, m.Sleep)):
            channel.send(m.Done(message.command_id, "this worker does not want to"))
            continue
        elif kind == "slow" and isinstance(message, m.Sleep):
            time.sleep(0.5)
            asleep = True
        elif kind == "slow" and isinstance(message, m.SetSetting):
            squeezing = message.command_id
            continue
        elif kind == "breaks" and isinstance(message, m.Wake):
            return
        elif isinstance(message, (m.SetProfile, m.SetSetting)):
            channel.send(ready(gib, message.setting, load))
        elif isinstance(message, (m.Sleep, m.Wake)):
            asleep = isinstance(message, m.Sleep)
        weights = 0 if asleep else int(gib * GIB)
        channel.send(m.Stats(running=len(held), kv_tokens=1000 * len(held)))
        if hasattr(message, "command_id"):
            host = int(gib * GIB) if asleep else 0
            footprint = m.Footprint(0, 32_768, weights_bytes=weights, reserved_bytes=weights, host_bytes=host)
            channel.send(footprint, m.Done(message.command_id))
            if squeezing and isinstance(message, m.SetLease):
                channel.send(m.Done(squeezing, "this worker takes too long"))
                squeezing = ""


if __name__ == "__main__":
    main()
