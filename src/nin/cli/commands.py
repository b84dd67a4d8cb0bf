"""What the shell's verbs do and show: one module for each kind of verb."""

from nin.cli.check import check, shards, show_findings
from nin.cli.console import Bar, percent, print_json, results, stop_requests, words
from nin.cli.inspect_network import bench, cost, export, report, serve
from nin.cli.narrow import narrow, narrow_network
from nin.cli.predict import predict, prediction_dict, predictions_table
from nin.cli.train import load_data, show_result, train, train_visibly, write_report

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
