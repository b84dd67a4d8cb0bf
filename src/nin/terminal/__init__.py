"""What the shell's verbs do and show: one module for each kind of verb."""

from nin.terminal.checking import check, shards, show_findings
from nin.terminal.console import Bar, percent, print_json, results, stop_requests, words
from nin.terminal.learning import load_data, show_result, train, train_visibly, write_report
from nin.terminal.looking import bench, cost, export, report, serve
from nin.terminal.narrowing import narrow, narrow_network
from nin.terminal.predicting import predict, prediction_dict, predictions_table

__all__ = [
    "Bar",
    "bench",
    "check",
    "cost",
    "export",
    "load_data",
    "narrow",
    "narrow_network",
    "percent",
    "predict",
    "prediction_dict",
    "predictions_table",
    "print_json",
    "report",
    "results",
    "serve",
    "shards",
    "show_findings",
    "show_result",
    "stop_requests",
    "train",
    "train_visibly",
    "words",
    "write_report",
]
