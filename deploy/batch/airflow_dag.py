"""An Airflow DAG (Airflow 3): every night the day before is classified, its priors estimated.

Its pictures lie in a folder of that date and change no more; a day without a folder has none. A
retry has the same date, so the same folders, and goes on where the last one ended.
"""

from datetime import datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG
from airflow.timetables.interval import CronDataIntervalTimetable

with DAG(
    "likely_classify",
    # Of a plain cron expression, Airflow 3 would give the date of the run, and not of its pictures.
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
