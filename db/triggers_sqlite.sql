-- Keep run_counts true in the transaction that changes clips, then give the planner the statistics
-- of a large run.
-- Submitted clips are counted in db/bulk_insert.py: a trigger would cost as much as the row.
-- Empty lines separate the statements.

CREATE TRIGGER clips_added AFTER INSERT ON clips WHEN new.state <> 'pending' BEGIN
  INSERT INTO run_counts (run_id, state, writer, clips, audio_s, finished_at)
  VALUES (new.run_id, new.state, 0, 1, coalesce(new.duration_s, 0), coalesce(new.finished_at, 0))
  ON CONFLICT DO UPDATE SET clips = clips + 1, audio_s = audio_s + excluded.audio_s,
                            finished_at = max(finished_at, excluded.finished_at);
END;

CREATE TRIGGER clips_moved AFTER UPDATE OF state ON clips BEGIN
  INSERT INTO run_counts (run_id, state, writer, clips, audio_s, finished_at)
  VALUES (new.run_id, new.state, 0, 1, coalesce(new.duration_s, 0), coalesce(new.finished_at, 0))
  ON CONFLICT DO UPDATE SET clips = clips + 1, audio_s = audio_s + excluded.audio_s,
                            finished_at = max(finished_at, excluded.finished_at);
  UPDATE run_counts SET clips = clips - 1, audio_s = audio_s - coalesce(old.duration_s, 0)
  WHERE run_id = old.run_id AND state = old.state AND writer = 0;
END;

CREATE TRIGGER clips_removed AFTER DELETE ON clips BEGIN
  UPDATE run_counts SET clips = clips - 1, audio_s = audio_s - coalesce(old.duration_s, 0)
  WHERE run_id = old.run_id AND state = old.state AND writer = 0;
END;

ANALYZE;

INSERT INTO sqlite_stat1 (tbl, idx, stat)
VALUES ('clips', 'clips_run', '1000000 500000'),
       ('clips', 'sqlite_autoindex_clips_1', '1000000 600000 1'),
       ('clips', 'clips_label', '1000000 500000 1000 2'), ('labels', 'ix_labels_name', '1000 2'),
       ('runs', 'sqlite_autoindex_runs_1', '100 1');
