"""Data to train on: the digits that ship with fastdl, tables from CSV and NPZ files, and splits."""

from fastdl.data.digits import load_digits
from fastdl.data.preprocessing import Preprocessing
from fastdl.data.split import random_split, stratified_split
from fastdl.data.table import Table, read_table

__all__ = ["Preprocessing", "Table", "load_digits", "random_split", "read_table", "stratified_split"]
