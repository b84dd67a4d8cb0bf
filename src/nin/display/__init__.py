"""What people see of numbers: percentages and counts, tables, and charts as SVG."""
