-- Parts `clips` by run, for a PostgreSQL that is to hold billions of them: once, after `earmark db upgrade`, before the
-- first run. A part holds the clips of a thousand runs here; make them as suits you.
-- What it costs: a clip found by its id alone is looked for in every part. What it gives: a part is vacuumed, moved and
-- dropped by itself (`ALTER TABLE clips DETACH PARTITION ...`).
DO $$
DECLARE
  kept record;
  views text[] := '{}';
  indexes text[] := '{}';
  triggers text[] := '{}';
  statement text;
BEGIN
  FOR kept IN SELECT c.oid, c.relname FROM pg_class c
              WHERE c.relkind = 'v' AND c.relnamespace = current_schema()::regnamespace ORDER BY c.oid LOOP
    views := views || format('CREATE OR REPLACE VIEW %I AS %s', kept.relname, pg_get_viewdef(kept.oid));
  END LOOP;
  FOR kept IN SELECT indexdef FROM pg_indexes WHERE tablename = 'clips' AND indexdef LIKE 'CREATE INDEX%' LOOP
    indexes := indexes || kept.indexdef;
  END LOOP;
  FOR kept IN SELECT oid FROM pg_trigger WHERE tgrelid = 'clips'::regclass AND NOT tgisinternal LOOP
    triggers := triggers || pg_get_triggerdef(kept.oid);
  END LOOP;
  ALTER TABLE window_predictions DROP CONSTRAINT window_predictions_clip_id_fkey;
  CREATE TABLE parted (LIKE clips INCLUDING DEFAULTS INCLUDING CONSTRAINTS) PARTITION BY RANGE (run_id);
  ALTER SEQUENCE clips_id_seq OWNED BY parted.id;
  DROP TABLE clips CASCADE;
  ALTER TABLE parted RENAME TO clips;
  ALTER TABLE clips ADD PRIMARY KEY (id, run_id), ADD UNIQUE (run_id, uri_key);
  FOREACH statement IN ARRAY indexes || triggers || views LOOP
    EXECUTE statement;
  END LOOP;
END $$;

CREATE TABLE clips_of_runs_1_to_1000 PARTITION OF clips FOR VALUES FROM (1) TO (1001);
CREATE TABLE clips_of_later_runs PARTITION OF clips DEFAULT;
