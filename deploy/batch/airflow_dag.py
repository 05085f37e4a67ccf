"""An Airflow DAG (Airflow 3): every day's pictures are classified, their priors estimated.

A retry has the same date, so the same folder, and goes on where the last one ended.
"""

from datetime import datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

with DAG(
    "likely_classify",
    schedule="@daily",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 20, "retry_delay": timedelta(minutes=2)},
):
    BashOperator(
        task_id="classify",
        bash_command=(
            "likely batch classify /data/incoming/{{ ds }} --estimate-priors "
            "--bundle /bundles/fashion_mnist --out /data/labels/{{ ds }}"
        ),
    )
