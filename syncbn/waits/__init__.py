# SPDX-License-Identifier: BSD-3-Clause
"""No rank waits without a limit and a name. See docs/clusters/hangs.md and docs/decisions/0009.

limits.py      how long a call may wait, and the variables that say so
status.py      what a rank says of itself: its calls, the line of the user's code, how it ended
processes.py   whether the process of another rank of this host runs, is stopped or is gone
lines.py       a TCP connection that carries lines, and whether the host at its other end answers
channel.py     such connections, beside the transports, by which ranks tell their status
diagnosis.py   from the status of all ranks: who waits for whom
ranks.py       how ranks are named in a text
findings.py    what that means, in a sentence, and what to do
report.py      the table, and the JSON
judge.py       looks at all ranks, warns, reports, and says when the job ends
watchdog.py    the thread of every process
making.py      the first call of a group that is being made
"""
