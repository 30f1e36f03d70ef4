"""Free memory is limited by the machine and by the container."""

from __future__ import annotations

from msflow_ext.hardware import free_memory


def test_free_memory_is_the_smaller_of_machine_and_container(tmp_path):
    assert free_memory(tmp_path) is None
    files = {
        "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n",
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/memory.current": "1000\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path) == 4000 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("3000\n")
    assert free_memory(tmp_path) == 2000
    here = free_memory()
    assert here is None or here > 0
