"""What a run with ``report: true`` leaves beside everything else; the shipped configs have it."""

REPORT = {
    "report.html",
    "routing_balance.json",
    "routing_balance.png",
    "communication_time.json",
    "communication_time.png",
    "communication_trace.json",
}

# What a finished predict leaves besides its results.
JOB = {"_SUCCESS", "job"}
