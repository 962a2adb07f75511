"""What a run tells about itself: metrics.jsonl, the terminal, summary.json and the HTML report."""
