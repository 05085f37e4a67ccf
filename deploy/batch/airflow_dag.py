"""An Airflow 3 DAG that classifies the previous day's pictures every night and estimates priors.

The pictures of a day are in a folder named after its date and no longer change. A day without a
folder has no pictures. A retry has the same date, so it uses the same folders and resumes where the
previous attempt stopped.
"""

from datetime import datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG
from airflow.timetables.interval import CronDataIntervalTimetable

with DAG(
    "likely_classify",
    # With a plain cron expression, Airflow 3 sets `ds` to the date of the run, not of its pictures.
    schedule=CronDataIntervalTimetable("15 2 * * *", timezone="UTC"),
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 20, "retry_delay": timedelta(minutes=2)},
):
    BashOperator(
        task_id="classify",
        bash_command=(
            '[ -d "/data/incoming/{{ ds }}" ] || { echo "no pictures of {{ ds }}"; exit 0; }; '
            "exec likely batch classify /data/incoming/{{ ds }} --estimate-priors "
            "--bundle /bundles/fashion_mnist --out /data/labels/{{ ds }}"
        ),
    )
