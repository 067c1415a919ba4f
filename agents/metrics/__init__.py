"""What is measured: one table of metrics, and their averages."""

from agents.metrics.average import Average
from agents.metrics.entry import Metric
from agents.metrics.table import METRICS, described, metric, register_metric

__all__ = ["METRICS", "Average", "Metric", "described", "metric", "register_metric"]
