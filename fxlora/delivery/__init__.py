"""Files for other runtimes: one call writes a format, loads it again and compares."""

from .exporting import export as export
from .exporting import export_adapter as export_adapter
