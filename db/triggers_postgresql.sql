-- Keeps run_counts true, in the transaction that moves the clips: once a statement, however many clips it moves.

CREATE FUNCTION count_clips() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP <> 'DELETE' THEN
    INSERT INTO run_counts AS n (run_id, state, writer, clips, audio_s, finished_at)
    SELECT run_id, state, pg_backend_pid(), count(*), coalesce(sum(duration_s), 0), coalesce(max(finished_at), 0)
    FROM new_clips GROUP BY run_id, state
    ON CONFLICT (run_id, state, writer) DO UPDATE
    SET clips = n.clips + excluded.clips, audio_s = n.audio_s + excluded.audio_s,
        finished_at = greatest(n.finished_at, excluded.finished_at);
  END IF;
  IF TG_OP <> 'INSERT' THEN
    INSERT INTO run_counts AS n (run_id, state, writer, clips, audio_s, finished_at)
    SELECT run_id, state, pg_backend_pid(), -count(*), -coalesce(sum(duration_s), 0), 0
    FROM old_clips GROUP BY run_id, state
    ON CONFLICT (run_id, state, writer) DO UPDATE
    SET clips = n.clips + excluded.clips, audio_s = n.audio_s + excluded.audio_s;
  END IF;
  RETURN NULL;
END $$;

CREATE TRIGGER clips_added AFTER INSERT ON clips REFERENCING NEW TABLE AS new_clips
FOR EACH STATEMENT EXECUTE FUNCTION count_clips();

CREATE TRIGGER clips_moved AFTER UPDATE ON clips REFERENCING OLD TABLE AS old_clips NEW TABLE AS new_clips
FOR EACH STATEMENT EXECUTE FUNCTION count_clips();

CREATE TRIGGER clips_removed AFTER DELETE ON clips REFERENCING OLD TABLE AS old_clips
FOR EACH STATEMENT EXECUTE FUNCTION count_clips();
