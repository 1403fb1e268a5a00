# What the jobs of this folder share. A job sources it, starts its command in the background, and calls
# wait_or_requeue. Ten minutes before the time is over, SLURM sends USR1 to the job's shell, which passes it on:
# the command saves and ends, and the job comes again.
again=""
trap 'again=yes; kill -USR1 "$!"' USR1

wait_or_requeue() {  # JOB, the name by which SLURM knows the job
    wait "$!"
    local status=$?
    if [ "$again" ]; then
        wait "$!"  # the first wait ended with the signal
        scontrol requeue "$1"
    fi
    exit "$status"
}
