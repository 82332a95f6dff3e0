"""Training traffic: collective operations as schedules, and their execution on emulated endpoints.

Pure: `schedule` (who sends what to whom), `values`, `rank` (one rank at work), `model` (a workload), `profiles`,
`report`. With I/O: `program` (a rank's process), `execution` (all of them, on a fabric).
"""

from qpd.lab.endpoint.config import Transport
from qpd.lab.workload.execution import Execution, run
from qpd.lab.workload.model import Workload
from qpd.lab.workload.profiles import PROFILES
from qpd.lab.workload.report import Iteration, Report

__all__ = ["PROFILES", "Execution", "Iteration", "Report", "Transport", "Workload", "run"]
