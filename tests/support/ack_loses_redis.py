"""A real worker that has Redis killed (its pid in ACK_KILLS) right before its first acknowledgement.

The product does not know: this launcher wraps one method of the transport in this process alone,
and then runs Celery's own main with the arguments it was given.
"""

from __future__ import annotations

import os
import signal

from celery.__main__ import main
from kombu.transport.redis import QoS

acknowledge = QoS.ack
doomed = [int(os.environ["ACK_KILLS"])]


def kill_and_acknowledge(qos: QoS, delivery_tag: str) -> None:
    if doomed:
        os.kill(doomed.pop(), signal.SIGKILL)
    acknowledge(qos, delivery_tag)


if __name__ == "__main__":
    QoS.ack = kill_and_acknowledge
    main()
