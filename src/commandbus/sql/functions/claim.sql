-- claim_v1: leases up to p_limit commands of the types and places that p_segments names.
-- p_segments: [[command_type, after, up_to], ...], places in (after, up_to]: a worker remembers how far the queue is
-- empty and need not walk over what is finished. p_lease: seconds. p_sweep: first look for expired leases.
-- p_alone: lease one command that has crashed twice, and nothing else.
-- SCHEDULED -> PENDING when due (500 a call); PENDING -> IN_PROGRESS; with p_sweep the edges of _sweep.
-- Answers a row a command and then one without command_id: next_due is the time in seconds until the next SCHEDULED
-- command (null: none), alone_waiting says that a command of these types has waited for 1 s to be run alone.
-- Locks: the rows claimed, never waiting for one; then claim marks by type and level.
--
-- The shape is pinned by planner switches and a generic plan. Chosen by cost, a table that was analyzed while empty
-- made the planner sort the whole queue: 130 claims/s instead of 4,000. The update goes by ctid. The switches make
-- plans look dear (1e10), so that PostgreSQL up to 17 would compile each: 93 ms a claim instead of 0.7. Hence no JIT.
CREATE OR REPLACE FUNCTION commandbus.claim_v1(
    p_domain text, p_segments text, p_limit integer, p_worker text, p_lease double precision,
    p_sweep boolean DEFAULT false, p_alone boolean DEFAULT false)
RETURNS TABLE (command_id uuid, command_type text, data text, headers text, correlation_id text, reply_to text,
               priority smallint, max_attempts integer, attempts integer, crashes integer, delivery bigint,
               lease_token uuid, place bigint, sent_at timestamptz, next_due double precision, alone_waiting boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY
        SELECT * FROM commandbus._claim(p_domain, p_segments, p_limit, p_worker, p_lease, p_sweep, p_alone, 0);
END $$;

-- _claim: claim_v1; of the p_limit, the last p_ahead have no slot yet, see _look_ahead.
CREATE OR REPLACE FUNCTION commandbus._claim(
    p_domain text, p_segments text, p_limit integer, p_worker text, p_lease double precision, p_sweep boolean,
    p_alone boolean, p_ahead integer)
RETURNS TABLE (command_id uuid, command_type text, data text, headers text, correlation_id text, reply_to text,
               priority smallint, max_attempts integer, attempts integer, crashes integer, delivery bigint,
               lease_token uuid, place bigint, sent_at timestamptz, next_due double precision, alone_waiting boolean)
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET enable_hashjoin = off
SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
    v_now    timestamptz := commandbus.clock();
    v_types  text[] := ARRAY(SELECT DISTINCT g ->> 0 FROM json_array_elements(p_segments::json) g);
    v_held   tid[] := '{}';
    v_ahead  tid[] := '{}';
    v_hoped  integer := p_limit;
    v_ranges jsonb;
    v_shares jsonb;
BEGIN
    IF p_sweep THEN
        PERFORM commandbus._sweep(p_domain);
    END IF;
    PERFORM commandbus._promote(p_domain);
    IF p_alone THEN
        v_held := ARRAY(
            SELECT q.ctid FROM commandbus.command q
            WHERE q.domain = p_domain AND q.alone_since IS NOT NULL AND q.status = 'PENDING'
              AND q.command_type = ANY (v_types)
            ORDER BY q.alone_since LIMIT 1 FOR UPDATE SKIP LOCKED);
    ELSE
        v_ranges := commandbus._ranges(p_domain, p_segments::json);
        IF cardinality(v_types) > 1 THEN
            v_shares := commandbus._shares(p_domain, v_ranges, p_limit);
            v_held := commandbus._lock(p_domain, v_shares, p_limit, '{}');
            v_hoped := (SELECT sum((g ->> 3)::integer) FROM jsonb_array_elements(v_shares) g);
        END IF;
        IF cardinality(v_held) < v_hoped THEN  -- one type, or rivals hold some of what was shared out
            v_held := v_held || commandbus._lock(p_domain, v_ranges, p_limit - cardinality(v_held), v_held);
        END IF;
        IF p_ahead > 0 THEN
            v_held := commandbus._look_ahead(v_held, p_limit - p_ahead);
            v_ahead := v_held[p_limit - p_ahead + 1:];
        END IF;
        PERFORM commandbus._mark(p_domain, v_held);
    END IF;
    RETURN QUERY
        UPDATE commandbus.command AS c
        SET status = 'IN_PROGRESS', delivery = c.delivery + 1, lease_token = gen_random_uuid(),
            lease_until = v_now + make_interval(secs => p_lease), claimed_at = v_now, worker = p_worker,
            ahead = c.ctid = ANY (v_ahead)
        WHERE c.ctid = ANY (v_held)
        RETURNING c.command_id, c.command_type, c.data::text, c.headers::text, c.correlation_id, c.reply_to,
                  c.priority, c.max_attempts, c.attempts, c.crashes, c.delivery, c.lease_token, c.place, c.sent_at,
                  NULL::double precision, NULL::boolean;
    RETURN QUERY
        SELECT NULL::uuid, NULL, NULL, NULL, NULL, NULL, NULL::smallint, NULL::integer, NULL::integer, NULL::integer,
               NULL::bigint, NULL::uuid, NULL::bigint, NULL::timestamptz,
               (SELECT extract(epoch FROM q.due_at - v_now)::double precision FROM commandbus.command q
                WHERE q.domain = p_domain AND q.due_at IS NOT NULL ORDER BY q.due_at LIMIT 1),
               EXISTS (SELECT FROM commandbus.command q
                       WHERE q.domain = p_domain AND q.alone_since < v_now - interval '1 s' AND q.status = 'PENDING'
                         AND q.command_type = ANY (v_types));
END $$;

-- work_v1: complete_v1 and then claim_v1 in one call and one commit: a busy worker's round.
-- Answers as claim_v1 does, and before that a row, with nothing but command_id and outcome, for each item that is not
-- done: busy or lost. Nothing said of an item means done.
-- p_ahead: of the p_limit, so many would wait in the worker for a slot: those with the last places; see _look_ahead.
CREATE OR REPLACE FUNCTION commandbus.work_v1(
    p_domain text, p_items text, p_segments text, p_limit integer, p_worker text, p_lease double precision,
    p_sweep boolean DEFAULT false, p_alone boolean DEFAULT false, p_ahead integer DEFAULT 0)
RETURNS TABLE (command_id uuid, command_type text, data text, headers text, correlation_id text, reply_to text,
               priority smallint, max_attempts integer, attempts integer, crashes integer, delivery bigint,
               lease_token uuid, place bigint, sent_at timestamptz, next_due double precision, alone_waiting boolean,
               outcome text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    v_json json := p_items;
    v_done uuid[] := commandbus._finish(commandbus._hold(p_domain, v_json), 'COMPLETED', v_json);
BEGIN
    IF cardinality(v_done) < json_array_length(v_json) THEN
        RETURN QUERY
            SELECT a.command_id, NULL, NULL, NULL, NULL, NULL, NULL::smallint, NULL::integer, NULL::integer,
                   NULL::integer, NULL::bigint, NULL::uuid, NULL::bigint, NULL::timestamptz, NULL::double precision,
                   NULL::boolean, a.outcome
            FROM commandbus._answer(p_domain, v_json, v_done) a WHERE a.outcome <> 'done';
    END IF;
    RETURN QUERY
        SELECT c.*, NULL
        FROM commandbus._claim(p_domain, p_segments, p_limit, p_worker, p_lease, p_sweep, p_alone, p_ahead) c;
END $$;

-- _ranges: cuts segments that span priorities into those that have commands waiting: [[type, after, up_to], ...].
CREATE OR REPLACE FUNCTION commandbus._ranges(p_domain text, p_segments json) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    v_ranges jsonb := '[]';
    v_after  bigint;
    v_up_to  bigint;
    s        record;
BEGIN
    FOR s IN SELECT g ->> 0 AS command_type, (g ->> 1)::bigint AS after, (g ->> 2)::bigint AS up_to
             FROM json_array_elements(p_segments) g ORDER BY 1, 2 LOOP
        v_after := s.after;
        WHILE v_after >> 54 <> s.up_to >> 54 LOOP
            SELECT greatest(v_after, (q.place >> 54 << 54) - 1), least(s.up_to, ((q.place >> 54) + 1 << 54) - 1)
              INTO v_after, v_up_to FROM commandbus.command q
             WHERE q.domain = p_domain AND q.command_type = s.command_type AND q.place > v_after
               AND q.place <= s.up_to AND q.status = 'PENDING'
             ORDER BY q.place LIMIT 1;
            EXIT WHEN NOT FOUND;
            v_ranges := v_ranges || jsonb_build_array(jsonb_build_array(s.command_type, v_after, v_up_to));
            v_after := v_up_to;
        END LOOP;
        IF v_after >> 54 = s.up_to >> 54 AND v_after < s.up_to THEN
            v_ranges := v_ranges || jsonb_build_array(jsonb_build_array(s.command_type, v_after, s.up_to));
        END IF;
    END LOOP;
    RETURN v_ranges;
END $$;

-- _shares: merges several types by place: how many of the p_limit first stand in each range, as its fourth element.
CREATE OR REPLACE FUNCTION commandbus._shares(p_domain text, p_ranges jsonb, p_limit integer) RETURNS jsonb
LANGUAGE plpgsql AS $$
BEGIN
    RETURN (
        SELECT coalesce(jsonb_agg(m.r || to_jsonb(m.share) ORDER BY m.r), '[]') FROM (
            SELECT n.r, count(*) AS share FROM (
                SELECT g.r, q.place FROM jsonb_array_elements(p_ranges) AS g(r)
                CROSS JOIN LATERAL (
                    SELECT q.place FROM commandbus.command q
                    WHERE q.domain = p_domain AND q.command_type = g.r ->> 0 AND q.place > (g.r ->> 1)::bigint
                      AND q.place <= (g.r ->> 2)::bigint AND q.status = 'PENDING'
                    ORDER BY q.place LIMIT p_limit) q
                ORDER BY q.place LIMIT p_limit) n
            GROUP BY n.r) m);
END $$;

-- _lock: locks up to p_limit commands of these ranges, and of each at most its share; those that somebody else has
-- locked are passed over for the next ones, so the order is a tendency. p_but: locked already.
CREATE OR REPLACE FUNCTION commandbus._lock(p_domain text, p_ranges jsonb, p_limit integer, p_but tid[]) RETURNS tid[]
LANGUAGE plpgsql AS $$
DECLARE
    v_held tid[] := '{}';
    v_more tid[];
    s      record;
BEGIN
    FOR s IN SELECT g ->> 0 AS command_type, (g ->> 1)::bigint AS after, (g ->> 2)::bigint AS up_to,
                    (g ->> 3)::integer AS share
             FROM jsonb_array_elements(p_ranges) g LOOP
        EXIT WHEN cardinality(v_held) >= p_limit;
        v_more := ARRAY(
            SELECT q.ctid FROM commandbus.command q
            WHERE q.domain = p_domain AND q.command_type = s.command_type AND q.place > s.after
              AND q.place <= s.up_to AND q.status = 'PENDING' AND q.ctid <> ALL (p_but)
            ORDER BY q.place LIMIT least(s.share, p_limit - cardinality(v_held)) FOR UPDATE SKIP LOCKED);
        v_held := v_held || v_more;
    END LOOP;
    RETURN v_held;
END $$;

-- _look_ahead: of these commands, in order of place, the first p_start and of the rest those before the first that was
-- delivered before. An expired lease of the rest charges nothing; as that can happen to a first delivery only, it
-- happens once, and what kills its process is still parked: after four deliveries instead of three.
CREATE OR REPLACE FUNCTION commandbus._look_ahead(p_held tid[], p_start integer) RETURNS tid[]
LANGUAGE plpgsql AS $$
BEGIN
    RETURN ARRAY(
        SELECT l.ctid FROM (
            SELECT n.ctid, n.n, bool_or(n.n > p_start AND n.delivery > 0) OVER (ORDER BY n.n) AS is_behind
            FROM (SELECT c.ctid, c.delivery, row_number() OVER (ORDER BY c.place) AS n
                  FROM commandbus.command c WHERE c.ctid = ANY (p_held)) n) l
        WHERE NOT l.is_behind ORDER BY l.n);
END $$;

-- _mark: raises the claim marks to cover these commands. A mark runs 4,096 ahead: one write in as many claims.
-- Locks: claim marks by type and level, waited for.
CREATE OR REPLACE FUNCTION commandbus._mark(p_domain text, p_held tid[]) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    t record;
BEGIN
    FOR t IN SELECT c.command_type, (c.place >> 54)::integer AS level, max(c.place) AS place
             FROM commandbus.command c WHERE c.ctid = ANY (p_held) GROUP BY 1, 2 ORDER BY 1, 2 LOOP
        IF NOT EXISTS (SELECT FROM commandbus.claim_mark m WHERE m.domain = p_domain
                       AND m.command_type = t.command_type AND m.level = t.level AND m.place >= t.place) THEN
            INSERT INTO commandbus.claim_mark AS m (domain, command_type, level, place)
            VALUES (p_domain, t.command_type, t.level, t.place + 4096)
            ON CONFLICT (domain, command_type, level) DO UPDATE SET place = greatest(m.place, excluded.place);
        END IF;
    END LOOP;
END $$;

-- _promote: SCHEDULED -> PENDING for what is due, at most 500 a call. A command that crashed twice waits alone.
CREATE OR REPLACE FUNCTION commandbus._promote(p_domain text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz := commandbus.clock();
BEGIN
    UPDATE commandbus.command AS c
    SET status = 'PENDING', due_at = NULL,
        place = CASE WHEN c.crashes < 2 THEN commandbus._place(c.priority) END,
        alone_since = CASE WHEN c.crashes < 2 THEN NULL ELSE v_now END
    WHERE c.ctid = ANY (ARRAY(
        SELECT q.ctid FROM commandbus.command q WHERE q.domain = p_domain AND q.due_at <= v_now
        ORDER BY q.due_at LIMIT 500 FOR UPDATE SKIP LOCKED));
END $$;

-- _sweep: counts a crash for every lease of the domain that ran out; up to 500 a type and level in a call.
-- IN_PROGRESS -> PENDING; at the second crash it waits to be run alone, so that what kills its process takes no
-- neighbour along; at the third -> IN_TROUBLESHOOTING_QUEUE. What waited in a worker that looked ahead has not crashed.
-- Changes of batches that wait to be counted are, too. Locks: the expired rows, never waiting for one; then batches.
CREATE OR REPLACE FUNCTION commandbus._sweep(p_domain text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_now     timestamptz := commandbus.clock();
    v_expired tid[];
    v_stuck   uuid[];
    m         record;
BEGIN
    v_expired := ARRAY(SELECT q.ctid FROM commandbus.command q
                       WHERE q.domain = p_domain AND q.alone_since IS NOT NULL AND q.status = 'IN_PROGRESS'
                         AND q.lease_until < v_now
                       ORDER BY q.alone_since LIMIT 500 FOR UPDATE SKIP LOCKED);
    FOR m IN SELECT k.command_type, k.level::bigint << 54 AS start, k.place FROM commandbus.claim_mark k
             WHERE k.domain = p_domain LOOP
        v_expired := v_expired || ARRAY(
            SELECT q.ctid FROM commandbus.command q
            WHERE q.domain = p_domain AND q.command_type = m.command_type AND q.place >= m.start
              AND q.place <= m.place AND q.status = 'IN_PROGRESS' AND q.lease_until < v_now
            ORDER BY q.place LIMIT 500 FOR UPDATE SKIP LOCKED);
    END LOOP;
    WITH crashed AS (
        UPDATE commandbus.command AS c
        SET crashes = c.crashes + CASE WHEN c.ahead THEN 0 ELSE 1 END, events = c.events + 1,
            status = CASE WHEN c.crashes < 2 THEN 'PENDING' ELSE 'IN_TROUBLESHOOTING_QUEUE' END,
            place = CASE WHEN c.crashes < 1 THEN commandbus._place(c.priority) END,
            alone_since = CASE WHEN c.crashes = 1 THEN v_now END,
            parked_at = CASE WHEN c.crashes >= 2 THEN v_now END,
            error = CASE WHEN NOT c.ahead THEN jsonb_build_object('code', 'CRASHED', 'message',
                format('The lease of %s ran out during delivery %s.', c.worker, c.delivery)) END
        WHERE c.ctid = ANY (v_expired)
        RETURNING c.*
    ), told AS (
        INSERT INTO commandbus.audit_event
            (domain, command_id, event_no, event, occurred_at, from_status, to_status, delivery, worker, claimed_at,
             lease_token, error)
        SELECT c.domain, c.command_id, c.events, CASE WHEN c.ahead THEN 'EXPIRED' ELSE 'CRASHED' END, v_now,
               'IN_PROGRESS', c.status, c.delivery, c.worker, c.claimed_at, c.lease_token, c.error
        FROM crashed c
    )
    SELECT array_agg(c.batch_id) INTO v_stuck FROM crashed c WHERE c.parked_at IS NOT NULL AND c.batch_id IS NOT NULL;
    IF v_stuck IS NOT NULL THEN
        PERFORM commandbus._count(p_domain, v_stuck, 'IN_TROUBLESHOOTING_QUEUE');
    END IF;
    PERFORM commandbus._settle_all(p_domain);
END $$;
