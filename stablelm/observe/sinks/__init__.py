"""Where records go: metrics.jsonl, the console, and the loggers of `observe.sinks`, one a file."""

from stablelm.observe.sinks.metrics_file import COUNTERS as COUNTERS
from stablelm.observe.sinks.metrics_file import SAMPLES as SAMPLES
from stablelm.observe.sinks.metrics_file import MetricsFile as MetricsFile
from stablelm.observe.sinks.metrics_file import last_records as last_records
from stablelm.observe.sinks.metrics_file import read_metrics as read_metrics
from stablelm.observe.sinks.metrics_file import storage_error as storage_error
from stablelm.observe.sinks.records import Records as Records
