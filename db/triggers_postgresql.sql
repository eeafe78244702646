-- Keep run_counts true in the transaction that changes clips: once a statement.
-- Submitted clips are counted in db/bulk_insert.py: a trigger would cost as much as the row.

CREATE FUNCTION count_clip() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO run_counts AS n (run_id, state, writer, clips, audio_s, finished_at)
  VALUES (new.run_id, new.state, pg_backend_pid(), 1,
          coalesce(new.duration_s, 0), coalesce(new.finished_at, 0))
  ON CONFLICT (run_id, state, writer) DO UPDATE
  SET clips = n.clips + 1, audio_s = n.audio_s + excluded.audio_s,
      finished_at = greatest(n.finished_at, excluded.finished_at);
  RETURN NULL;
END $$;

CREATE FUNCTION count_clips() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'UPDATE' THEN
    INSERT INTO run_counts AS n (run_id, state, writer, clips, audio_s, finished_at)
    SELECT run_id, state, pg_backend_pid(), count(*),
           coalesce(sum(duration_s), 0), coalesce(max(finished_at), 0)
    FROM new_clips GROUP BY run_id, state
    ON CONFLICT (run_id, state, writer) DO UPDATE
    SET clips = n.clips + excluded.clips, audio_s = n.audio_s + excluded.audio_s,
        finished_at = greatest(n.finished_at, excluded.finished_at);
  END IF;
  INSERT INTO run_counts AS n (run_id, state, writer, clips, audio_s, finished_at)
  SELECT run_id, state, pg_backend_pid(), -count(*), -coalesce(sum(duration_s), 0), 0
  FROM old_clips GROUP BY run_id, state
  ON CONFLICT (run_id, state, writer) DO UPDATE
  SET clips = n.clips + excluded.clips, audio_s = n.audio_s + excluded.audio_s;
  RETURN NULL;
END $$;

CREATE TRIGGER clips_added AFTER INSERT ON clips FOR EACH ROW WHEN (new.state <> 'pending')
EXECUTE FUNCTION count_clip();

CREATE TRIGGER clips_moved AFTER UPDATE ON clips
REFERENCING OLD TABLE AS old_clips NEW TABLE AS new_clips
FOR EACH STATEMENT EXECUTE FUNCTION count_clips();

CREATE TRIGGER clips_removed AFTER DELETE ON clips REFERENCING OLD TABLE AS old_clips
FOR EACH STATEMENT EXECUTE FUNCTION count_clips();
